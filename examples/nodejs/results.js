// Reads and follows the results of Celery tasks: docs/wire.md, in JavaScript.
//
//   node results.js get ID [ID ...]     the state that counts of each, as a line of JSON
//   node results.js watch [STATE]       every state as it is published, or those of one name
//
// Environment: AMQP_URL (amqp://guest:guest@127.0.0.1:5672/), RESULT_EXCHANGE (celeryresults),
// SHARDS (256). Results have to be JSON, and not compressed.

import { randomUUID } from "node:crypto";
import amqp from "amqplib";

const url = process.env.AMQP_URL ?? "amqp://guest:guest@127.0.0.1:5672/";
const prefix = process.env.RESULT_EXCHANGE ?? "celeryresults";
const shards = Number(process.env.SHARDS ?? 256);

const RANKS = { SUCCESS: 3, FAILURE: 2, REVOKED: 2, ABORTED: 1 };

function crc32(bytes) {
  let crc = 0xffffffff;
  for (const byte of bytes) {
    crc ^= byte;
    for (let bit = 0; bit < 8; bit++) crc = (crc >>> 1) ^ (crc & 1 ? 0xedb88320 : 0);
  }
  return (crc ^ 0xffffffff) >>> 0;
}

/** What a message says; of a page, what each of its entries says. */
function* states(message) {
  const { type, headers = {}, correlationId, contentType, expiration } = message.properties;
  if (type === "state") {
    const id = headers.id ? Buffer.from(headers.id, "hex").toString() : correlationId;
    const compression = headers.compression;
    yield { id, state: headers.state, published: headers.published, contentType, compression, expiration, body: message.content };
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
      yield { id: head.i, state: head.s, published: head.p, contentType: head.t, compression: head.c, expiration: head.x, body: page.subarray(bodyAt, end) };
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

function meta({ id, state, contentType, compression, body }) {
  if (contentType !== "application/json" || compression)
    return { task_id: id, status: state, result: `(${contentType}, ${compression ?? "not compressed"})` };
  return JSON.parse(body);
}

/** Reads a shard without taking anything away. */
async function readShard(connection, number, wanted) {
  const queue = `${prefix}.shard.${number}`;
  const channel = await connection.createChannel();
  const found = new Map();
  let missing = false;
  channel.on("error", () => (missing = true));
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
    channel.on("close", resolve);
    try {
      await channel.prefetch(65535);
      await channel.consume(queue, (message) => {
        if (!message) return reject(new Error(`${queue} was deleted`));
        if (message.properties.type === "fence") {
          if (message.properties.messageId !== fence) return;
          channel.ack(message);
          const all = [...wanted].every((id) => found.has(id));
          if (fences === 1 && (!all || message.fields.redelivered)) setFence();
          else resolve();
          return;
        }
        for (const state of states(message))
          if (wanted.has(state.id) && !expired(state)) found.set(state.id, counts(found.get(state.id), state));
      });
      setFence();
    } catch (error) {
      // No such queue: nothing is kept in this shard.
      if (error.code === 404) resolve();
      else reject(error);
    }
  });
  // Puts everything back.
  if (!missing) await channel.close();
  return found;
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
      console.log(JSON.stringify(state ? meta(state) : { task_id: id, status: "PENDING" }));
    }
  }
}

async function watch(connection, state = "*") {
  const channel = await connection.createChannel();
  const { queue } = await channel.assertQueue("", { exclusive: true, durable: false, autoDelete: true });
  await channel.bindQueue(queue, `${prefix}.states`, `*.*.*.*.*.${state}`);
  await channel.consume(queue, (message) => {
    for (const each of states(message)) console.log(JSON.stringify(meta(each)));
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
