"""A page with a progress bar, which the examples of server-sent events serve."""

PAGE = """<!doctype html>
<title>Progress</title>
<button>Count to 50</button>
<progress max="50" value="0"></progress>
<output></output>
<script>
document.querySelector("button").onclick = async () => {
  // Django protects POST requests by this cookie; other frameworks ignore the header.
  const token = document.cookie.match(/(?:^|; )csrftoken=([^;]+)/)?.[1] ?? "";
  const headers = {"X-CSRFToken": token};
  const {id} = await (await fetch("/tasks?total=50", {method: "POST", headers})).json();
  const events = new EventSource(`/tasks/${id}/events`);
  events.onmessage = ({data}) => {
    const {state, result} = JSON.parse(data);
    document.querySelector("output").value = state;
    if (state === "PROGRESS") document.querySelector("progress").value = result.current;
    if (["SUCCESS", "FAILURE", "REVOKED"].includes(state)) {
      document.querySelector("progress").value = 50;
      events.close();  // A browser would connect again when the server ends the stream.
    }
  };
};
</script>
"""
