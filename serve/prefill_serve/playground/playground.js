// The playground: sends prompts to the endpoint and shows its decisions. Stores only the key, for this tab.

const $ = (id) => document.getElementById(id);
const conversation = $("conversation");
let card = null; // the response of GET /v1/router
let asking = null; // AbortController of the current routing request
let answering = null; // AbortController of the current answer

// --- requests -------------------------------------------------------------------------------------------------------

function headers() {
  const key = $("key").value.trim();
  return { "content-type": "application/json", ...(key && { authorization: `Bearer ${key}` }) };
}

// Returns the response; throws an Error with a message for the user.
async function request(path, options = {}) {
  let response;
  try {
    response = await fetch(path, { ...options, headers: headers() });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The endpoint does not answer. Is it running?");
  }
  if (response.ok) return response;
  const said = await response.json().catch(() => null);
  const message = said?.error?.message ?? response.statusText;
  const help = { 401: " Enter a key above.", 429: " Edit the prompt to try again." }[response.status] ?? "";
  throw new Error(`${response.status}: ${message}.${help}`.replace("..", "."));
}

function messages() {
  return [...conversation.children]
    .map((item) => ({ role: item.querySelector("select").value, content: item.querySelector("textarea").value }))
    .filter((message) => message.content.trim());
}

function show(element, text) {
  element.textContent = text;
  element.hidden = !text;
}

// --- routing --------------------------------------------------------------------------------------------------------

async function route() {
  asking?.abort();
  const said = messages();
  if (!said.length) {
    $("targets").hidden = true;
    show($("problem"), "");
    show($("timing"), "");
    $("decision").textContent = "Enter a prompt.";
    showNeeds();
    return;
  }
  const mine = (asking = new AbortController());
  const body = JSON.stringify({ messages: said, tolerance: Number($("tolerance").value), explain: true });
  const started = performance.now();
  try {
    const response = await request("v1/route", { method: "POST", body, signal: mine.signal });
    const answer = await response.json();
    if (mine !== asking) return;
    show($("problem"), "");
    showDecision(answer, performance.now() - started);
  } catch (error) {
    if (error.name === "AbortError" || mine !== asking) return;
    show($("problem"), error.message);
    showNeeds();
  }
}

function later(action, milliseconds) {
  let timer;
  return () => {
    clearTimeout(timer);
    timer = setTimeout(action, milliseconds);
  };
}

// At least three decimals, and as many more as it takes to read back the same number.
function exactly(tolerance) {
  for (let decimals = 3; decimals < 18; decimals++) {
    const text = tolerance.toFixed(decimals);
    if (Number(text) === tolerance) return text;
  }
  return String(tolerance);
}

const percent = (p) => `${(100 * p).toFixed(1)} %`;
// Cost per 1,000 prompts, as one prompt costs too little to read. Three significant digits, at least to the cent.
const money = new Intl.NumberFormat("en", {
  style: "currency",
  currency: "USD",
  minimumFractionDigits: 2,
  maximumFractionDigits: 2,
  minimumSignificantDigits: 3,
  maximumSignificantDigits: 3,
  roundingPriority: "morePrecision",
});
const usd = (cost) => money.format(1000 * cost);

// Says before Send is pressed what it needs and what it costs.
function showNeeds(answer = null) {
  if (!card) return;
  const able = card.targets.filter((target) => target.can_answer).map((target) => target.name);
  const chosen = answer?.selected_model;
  $("send").disabled = !able.length || !messages().length || $("stop").hidden === false;
  const lacking = able.length && able.length < card.targets.length ? ` Only ${able.join(", ")} can answer.` : "";
  if (!able.length) {
    show($("send-needs"), "This endpoint only routes. Send needs a pool whose targets have an upstream.");
  } else if (!messages().length) {
    show($("send-needs"), `Send needs a prompt.${lacking}`);
  } else if (able.includes(chosen)) {
    const cost = money.format(answer.expected_cost_usd[chosen]);
    show($("send-needs"), `Asks ${chosen}, which bills about ${cost} for this answer.${lacking}`);
  } else {
    show($("send-needs"), `Asks a target, which bills its answer.${lacking}`);
  }
}

function showDecision(answer, milliseconds) {
  const chosen = answer.selected_model;
  const small = document.createElement("small");
  small.textContent =
    `P(correct) ${percent(answer.p_correct[chosen])}, ${usd(answer.expected_cost_usd[chosen])} per 1,000 prompts` +
    timesOf(chosen, answer);
  $("decision").replaceChildren(chosen, small);
  const byChance = [...answer.model_names].sort((a, b) => answer.p_correct[b] - answer.p_correct[a]);
  $("targets").tBodies[0].replaceChildren(...byChance.map((name) => targetRow(name, answer)));
  $("targets").hidden = false;
  const { input_tokens: tokens, drift, is_cached: isCached, missing_encoders: missing = [] } = answer.metadata;
  const strange = drift?.is_out_of_distribution ? " Outside the training distribution: the estimates are less reliable." : "";
  const without = missing.length ? ` Estimated without ${missing.join(" and ")}, which failed.` : "";
  $("timing").textContent =
    `${tokens} tokens read in ${milliseconds.toFixed(0)} ms${isCached ? ", cached" : ""}.${strange}${without}`;
  $("timing").hidden = false;
  showNeeds(answer);
}

// Expected times, which are known once the gateway has measured some answers.
function timesOf(name, answer) {
  const [whole, first] = [answer.expected_s?.[name], answer.expected_first_token_s?.[name]];
  const start = first === undefined ? "" : `, first token after ${first.toPrecision(2)} s`;
  return whole === undefined ? start : `${start}, whole after ${whole.toPrecision(2)} s`;
}

function targetRow(name, answer) {
  const row = document.createElement("tr");
  row.role = "row";
  row.className = name === answer.selected_model ? "chosen" : "";
  const head = row.appendChild(document.createElement("th"));
  head.scope = "row";
  head.role = "rowheader";
  const why = document.createElement("small");
  why.textContent = `${answer.explanation?.[name] ?? ""}${timesOf(name, answer)}`;
  head.append(name, why);
  const p = row.insertCell();
  p.className = "p";
  p.append(percent(answer.p_correct[name]), bar(answer.p_correct[name]));
  for (const text of [usd(answer.expected_cost_usd[name]), answer.expected_output_tokens[name].toFixed(0)]) {
    const cell = row.insertCell();
    cell.className = "number";
    cell.textContent = text;
  }
  for (const cell of row.querySelectorAll("td")) cell.role = "cell";
  return row;
}

function svg(name, attributes, text = "") {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.textContent = text;
  return element;
}

function bar(share) {
  const box = svg("svg", { viewBox: "0 0 100 6", preserveAspectRatio: "none", "aria-hidden": "true" });
  box.append(svg("rect", { class: "track", width: 100, height: 6 }));
  box.append(svg("rect", { class: "value", width: 100 * share, height: 6 }));
  return box;
}

// --- the curve ------------------------------------------------------------------------------------------------------

function drawCurve() {
  const picture = $("curve");
  const title = svg("title", { id: "curve-title" }, "Accuracy against cost");
  if (!card?.curve.length) {
    picture.replaceChildren(title);
    picture.setAttribute("viewBox", "0 0 560 8");
    $("curve-text").textContent = card ? "This router has no recorded curve: train it again to get one." : "";
    return;
  }
  const singles = card.singles;
  const points = [...card.curve, ...singles];
  const [low, high] = [Math.min, Math.max].map((of) => of(...points.map((point) => point.accuracy)));
  const most = Math.max(...points.map((point) => point.cost_usd));
  const x = (point) => 52 + (470 * point.cost_usd) / (most || 1);
  const y = (point) => 270 - (240 * (point.accuracy - low)) / (high - low || 1);
  const at = Number($("tolerance").value);
  const here = card.curve.findLast((point) => point.tolerance <= at) ?? card.curve[0];
  const line = card.curve.map((point) => `${x(point).toFixed(1)},${y(point).toFixed(1)}`).join(" ");
  picture.replaceChildren(
    title,
    svg("path", { class: "axis", d: "M52 20V280H540", fill: "none" }),
    svg("text", { x: 44, y: 34, "text-anchor": "end" }, (100 * high).toFixed(0)),
    svg("text", { x: 44, y: 274, "text-anchor": "end" }, (100 * low).toFixed(0)),
    svg("text", { x: 52, y: 14 }, "% correct"),
    svg("text", { x: 540, y: 300, "text-anchor": "end" }, `${usd(most)} per 1,000 prompts`),
    ...singles.flatMap((single) => singleMark(single, x(single), y(single))),
    svg("polyline", { class: "line", points: line }),
    svg("circle", { class: "here", cx: x(here), cy: y(here), r: 8 }),
  );
  const best = singles.reduce((a, b) => (b.accuracy > a.accuracy ? b : a), singles[0]);
  const beside = best
    ? ` Always ${best.target}: ${percent(best.accuracy)} correct for ${usd(best.cost_usd)}.`
    : "";
  $("curve-text").textContent =
    `At tolerance ${exactly(at)}: ${percent(here.accuracy)} correct for ${usd(here.cost_usd)} per 1,000 ` +
    `prompts, on the router's validation prompts.${beside}${fewPrompts()}`;
}

function fewPrompts() {
  const { num_validation: num, enough_validation: enough } = card;
  if (num === null || num >= enough) return "";
  return ` They are ${num}, and with fewer than ${enough} these figures are mostly noise: the report says what would be enough.`;
}

function singleMark(single, x, y) {
  const isRight = x > 300;
  const place = { x: x + (isRight ? -8 : 8), y: y > 250 ? y - 8 : y + 16, "text-anchor": isRight ? "end" : "start" };
  const name = single.target.split("/").pop();
  return [svg("circle", { class: "single", cx: x, cy: y, r: 4 }), svg("text", place, name)];
}

// --- the answer -----------------------------------------------------------------------------------------------------

async function send() {
  const said = messages();
  if (!said.length) return;
  answering = new AbortController();
  $("send").disabled = $("add").disabled = true;
  $("stop").hidden = false;
  $("answer").textContent = $("served").textContent = "";
  $("answer").setAttribute("aria-busy", "true");
  show($("broken"), "");
  const body = JSON.stringify({
    model: "auto", messages: said, stream: true, tolerance: Number($("tolerance").value),
  });
  try {
    const response = await request("v1/chat/completions", { method: "POST", body, signal: answering.signal });
    const p = response.headers.get("x-router-p-correct");
    const by = response.headers.get("x-router-selected-model");
    $("served").textContent = `${by}${p ? `, P(correct) ${percent(Number(p))}` : ""}`;
    await readEvents(response.body);
  } catch (error) {
    if (error.name !== "AbortError") show($("broken"), error.message);
  } finally {
    $("add").disabled = false;
    $("stop").hidden = true;
    $("send").disabled = !messages().length;
    $("answer").setAttribute("aria-busy", "false");
  }
}

async function readEvents(stream) {
  let rest = "";
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("The answer ended before it was complete.");
    const events = (rest + value).split(/\r?\n\r?\n/);
    rest = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: ?/gm, "");
      if (data === "[DONE]") return;
      if (!data.startsWith("{")) continue;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(`The answer failed: ${chunk.error.message}`);
      $("answer").append(chunk.choices?.[0]?.delta?.content ?? "");
    }
  }
}

// --- the page -------------------------------------------------------------------------------------------------------

function addMessage(role = "user") {
  const item = $("message").content.cloneNode(true).firstElementChild;
  item.querySelector("select").value = role;
  item.querySelector(".remove").addEventListener("click", () => {
    item.remove();
    if (!conversation.children.length) addMessage();
    conversation.querySelector("textarea").focus();
    route();
  });
  conversation.append(item);
  return item;
}

async function start() {
  try {
    card = await (await request("v1/router")).json();
    show($("problem"), "");
  } catch (error) {
    show($("problem"), error.message);
    return;
  }
  $("router").textContent = `${card.targets.length} targets · ${card.encoder} · version ${card.router_version}`;
  $("tolerance").value = card.tolerance;
  showTolerance();
  $("answering").hidden = false;
  showNeeds();
  route();
}

function showTolerance() {
  $("tolerance-value").textContent = exactly(Number($("tolerance").value));
  drawCurve();
}

$("key").value = sessionStorage.getItem("key") ?? "";
$("key").form.addEventListener("submit", (event) => event.preventDefault());
$("key").addEventListener("change", () => {
  sessionStorage.setItem("key", $("key").value);
  start();
});
const routeSoon = later(route, 200);
conversation.addEventListener("input", routeSoon);
$("tolerance").addEventListener("input", () => {
  $("tolerance").value = Number($("tolerance").value).toFixed(3); // so that what is shown is what is sent
  showTolerance();
  route();
});
$("add").addEventListener("click", () => {
  const roles = [...conversation.querySelectorAll("select")].map((select) => select.value);
  addMessage(roles.at(-1) === "user" ? "assistant" : "user").querySelector("textarea").focus();
});
$("clear").addEventListener("click", () => {
  answering?.abort();
  conversation.replaceChildren();
  addMessage().querySelector("textarea").focus();
  $("answer").textContent = $("served").textContent = "";
  show($("broken"), "");
  route();
});
$("send").addEventListener("click", send);
$("stop").addEventListener("click", () => answering?.abort());
addMessage();
start();
