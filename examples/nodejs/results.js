// Reads and follows the results of Celery tasks: docs/wire.md, in JavaScript.
//
//   node results.js get ID [ID ...]     the state that counts of each, as a line of JSON
//   node results.js watch [STATE]       every state as it is published, or those of one name
//
// Environment: AMQP_URL (amqp://guest:guest@127.0.0.1:5672/), RESULT_EXCHANGE (celeryresults),
// SHARDS (256). Results have to be JSON. They may be large, and compressed with zlib, gzip, Brotli,
// or zstd where Node.js has it.

import { randomUUID } from "node:crypto";
import zlib from "node:zlib";
import amqp from "amqplib";

const url = process.env.AMQP_URL ?? "amqp://guest:guest@127.0.0.1:5672/";
const prefix = process.env.RESULT_EXCHANGE ?? "celeryresults";
const shards = Number(process.env.SHARDS ?? 256);

/** A compressed result may have this number of bytes when it is decompressed. */
const MAX_DECOMPRESSED = 128 * 1024 * 1024;

const DECOMPRESS = {
  // kombu names it gzip; the format is that of zlib.
  "application/x-gzip": zlib.inflateSync,
  "application/x-brotli": zlib.brotliDecompressSync,
  "application/zstd": zlib.zstdDecompressSync,
};

const RANKS = { SUCCESS: 3, FAILURE: 2, REVOKED: 2, ABORTED: 1 };

function crc32(bytes) {
  let crc = 0xffffffff;
  for (const byte of bytes) {
    crc ^= byte;
    for (let bit = 0; bit < 8; bit++) crc = (crc >>> 1) ^ (crc & 1 ? 0xedb88320 : 0);
  }
  return (crc ^ 0xffffffff) >>> 0;
}

/** Yields the states in a message: one, or all entries of a page. */
function* states(message) {
  const { type, headers = {}, correlationId, contentType, expiration } = message.properties;
  if (type === "state") {
    const id = headers.id ? Buffer.from(headers.id, "hex").toString() : correlationId;
    const { state, published, compression } = headers;
    const bodyQueue = headers["body-queue"];
    yield { id, state, published, contentType, compression, expiration, bodyQueue, body: message.content };
  } else if (type === "page") {
    const page = message.content;
    const count = page.readUInt32BE(8);
    for (let entry = 0; entry < count; entry++) {
      const at = 12 + 16 * entry;
      const start = page.readUInt32BE(at + 8);
      const end = start + page.readUInt32BE(at + 12);
      const bodyAt = start + 4 + page.readUInt32BE(start);
      const head = JSON.parse(page.subarray(start + 4, bodyAt));
      if ((head.k ?? "state") !== "state") continue;
      yield { id: head.i, state: head.s, published: head.p, contentType: head.t, compression: head.c, expiration: head.x, bodyQueue: head.q, body: page.subarray(bodyAt, end) };
    }
  }
}

function expired({ published, expiration }) {
  return expiration !== undefined && published / 1000 + Number(expiration) < Date.now();
}

/** Which of two states of a task counts. */
function counts(one, other) {
  if (!one) return other;
  const [a, b] = [RANKS[one.state] ?? 0, RANKS[other.state] ?? 0];
  if (a !== b) return a > b ? one : other;
  // The first SUCCESS counts, of anything else the latest.
  return (one.published <= other.published) === (a === 3) ? one : other;
}

/** Returns the meta of a state, or says why its body cannot be read. */
function meta({ id, state, contentType, compression, body }) {
  const unreadable = (why) => ({ task_id: id, status: state, result: null, unreadable: why });
  if (body === null) return unreadable("the large result has expired");
  const decompress = compression ? DECOMPRESS[compression] : (bytes) => bytes;
  if (!decompress) return unreadable(`compressed as ${compression}`);
  if (contentType !== "application/json") return unreadable(`its content type is ${contentType}`);
  try {
    return JSON.parse(decompress(body, { maxOutputLength: MAX_DECOMPRESSED }));
  } catch (error) {
    return unreadable(error.message);
  }
}

/**
 * Reads a queue to its end without taking anything away. Another reader may have moved messages
 * behind the first fence: `complete` says whether a second one is needed.
 */
async function readQueue(connection, queue, onMessage, complete) {
  const channel = await connection.createChannel();
  let gone = false;
  await new Promise(async (resolve, reject) => {
    let fence;
    let fences = 0;
    const setFence = () => {
      fence = randomUUID();
      fences += 1;
      channel.sendToQueue(queue, Buffer.alloc(0), {
        type: "fence", messageId: fence, expiration: "60000", deliveryMode: 1,
      });
    };
    const end = (error) => {
      // There is no such queue, or it was deleted while we waited: it holds nothing.
      if (error && error.code !== 404) return reject(error);
      gone ||= Boolean(error);
      resolve();
    };
    channel.on("error", end);
    channel.on("close", () => {
      gone = true;
      resolve();
    });
    try {
      await channel.prefetch(65535);
      await channel.consume(queue, (message) => {
        if (!message) return resolve();  // The queue was deleted.
        if (message.properties.type !== "fence") return onMessage(message);
        if (message.properties.messageId !== fence) return;
        channel.ack(message);
        if (fences === 1 && (message.fields.redelivered || !complete())) setFence();
        else resolve();
      });
      setFence();
    } catch (error) {
      end(error);
    }
  });
  // Closing the channel puts everything back.
  if (!gone) await channel.close();
}

/** Returns by id the state that counts of each of the wanted tasks in a shard. */
async function readShard(connection, number, wanted) {
  const found = new Map();
  const take = (message) => {
    for (const state of states(message))
      if (wanted.has(state.id) && !expired(state)) found.set(state.id, counts(found.get(state.id), state));
  };
  const complete = () => [...wanted].every((id) => found.has(id));
  await readQueue(connection, `${prefix}.shard.${number}`, take, complete);
  return found;
}

/** Returns a state with its body: a large result is a pointer to a queue that holds the body. */
async function withBody(connection, state) {
  if (state.bodyQueue === undefined) return state;
  // A forged pointer must not make us read another queue.
  if (!state.bodyQueue.startsWith(`${prefix}.large.`)) return { ...state, body: null };
  let body = null;
  const take = (message) => {
    for (const each of states(message))
      if (each.id === state.id && each.published === state.published) body = each.body;
  };
  await readQueue(connection, state.bodyQueue, take, () => body !== null);
  return { ...state, body };
}

async function get(connection, ids) {
  const byShard = new Map();
  for (const id of ids) {
    const number = crc32(Buffer.from(id)) % shards;
    byShard.set(number, (byShard.get(number) ?? new Set()).add(id));
  }
  for (const [number, wanted] of byShard) {
    const found = await readShard(connection, number, wanted);
    for (const id of wanted) {
      const state = found.get(id);
      const told = state ? meta(await withBody(connection, state)) : { task_id: id, status: "PENDING" };
      console.log(JSON.stringify(told));
    }
  }
}

async function watch(connection, state) {
  const channel = await connection.createChannel();
  const { queue } = await channel.assertQueue("", { exclusive: true, durable: false, autoDelete: true });
  // The name of the state is the last word of the routing key.
  await channel.bindQueue(queue, `${prefix}.states`, state ? `#.${state}` : "*.*.*.#");
  // One after the other, so that large results do not change the order.
  let last = Promise.resolve();
  await channel.consume(queue, (message) => {
    for (const each of states(message))
      last = last.then(async () => console.log(JSON.stringify(meta(await withBody(connection, each)))));
    last = last.catch((error) => console.error(error.message));
  }, { noAck: true });
  console.error("watching");
  await new Promise(() => {});
}

const [command, ...rest] = process.argv.slice(2);
if (command !== "get" && command !== "watch") {
  console.error("usage: node results.js get ID [ID ...] | watch [STATE]");
  process.exit(2);
}
const connection = await amqp.connect(`${url}${url.includes("?") ? "&" : "?"}heartbeat=5`);
await (command === "get" ? get(connection, rest) : watch(connection, rest[0]));
await connection.close();
