// The token view: one response, or two on the same prompt, each token in the colour of a figure; under it the value
// law of the token that is pointed at.
const chosen = { main: -1, beside: -1, colour: "advantages" };
const TITLES = { advantages: "advantage", value: "value", width: "width of the value law" };
const STRONGEST = 0.62;
let followers = [];

const viewOf = (index) => (index < 0 || data.completions[index].view < 0 ? null : data.views[data.completions[index].view]);
const numbers = (views, name) => views.flatMap((view) => (view && view[name]) || []).filter((x) => x !== null);

function openRow(index, jump) {
  chosen.main = index;
  chosen.beside = counterpart(index);
  fillBeside();
  drawPanes();
  if (typeof markChosen === "function") markChosen();
  if (!jump) return;
  find("#tokens").scrollIntoView({ block: "start" });
  const first = find(".tok[tabindex='0']");
  if (first) first.focus({ preventScroll: true });
}

// The same prompt in another run: at the same step and sample if it can be.
function counterpart(index) {
  const row = data.completions[index];
  const same = others(index).filter((other) => data.completions[other].run !== row.run);
  const cost = (other) => {
    const that = data.completions[other];
    return Math.abs(that.step - row.step) * 100 + Math.abs(that.sample - row.sample) + (that.view < 0 ? 1e6 : 0);
  };
  return same.sort((a, b) => cost(a) - cost(b))[0] ?? -1;
}

function others(index) {
  const row = data.completions[index];
  return data.completions.map((_, i) => i).filter((i) => i !== index && data.completions[i].prompt === row.prompt);
}

function title(row) {
  return `${data.runs[row.run]}, step ${row.step}, sample ${row.sample}`;
}

function fillBeside() {
  const options = others(chosen.main).map((i) => {
    const row = data.completions[i];
    return make("option", { value: i }, `${title(row)}${row.view < 0 ? " (text only)" : ""}`);
  });
  find("#beside").replaceChildren(make("option", { value: -1 }, "nothing"), ...options);
  find("#beside").value = chosen.beside;
  find("#beside").disabled = !options.length;
}

function drawPanes() {
  const views = [viewOf(chosen.main), viewOf(chosen.beside)];
  for (const input of all("#colour input")) {
    input.disabled = !numbers(views, input.value).length;
    input.checked = input.value === chosen.colour;
  }
  if (!numbers(views, chosen.colour).length) {
    const possible = Object.keys(TITLES).find((name) => numbers(views, name).length);
    if (possible) { chosen.colour = possible; return drawPanes(); }
  }
  followers = [];
  const scale = scaleOf(numbers(views, chosen.colour));
  const panes = [chosen.main, chosen.beside].filter((index) => index >= 0);
  find("#panes").replaceChildren(...panes.map((index) => pane(data.completions[index], viewOf(index), scale, views)));
  drawScale(scale);
}

function scaleOf(values) {
  if (!values.length) return null;
  if (chosen.colour === "advantages") {
    const most = Math.max(...values.map(Math.abs)) || 1;
    return { low: -most, high: most, paint: (x) => [x < 0 ? "negative" : "positive", Math.abs(x) / most] };
  }
  const low = Math.min(...values), high = Math.max(...values);
  return { low, high, paint: (x) => ["sequence", high > low ? (x - low) / (high - low) : 0.5] };
}

function drawScale(scale) {
  if (!scale) return find("#scale").replaceChildren();
  const kind = chosen.colour === "advantages" ? "diverging" : "sequential";
  find("#scale").replaceChildren(number(scale.low), make("i", { class: kind }), number(scale.high));
}

function pane(row, view, scale, views) {
  const facts = `observed ${number(row.observed)}, true ${number(row.true)}, prompt ${row.id}`;
  const talk = make("div", { class: "talk" }, ...data.prompts[row.prompt].map((message) => bubble(message.role, "", message.text)));
  const detail = make("div", { class: "detail", "aria-live": "polite" });
  const node = make("div", { class: "pane" }, make("h3", {}, title(row)), make("p", { class: "facts" }, facts), talk, detail);
  if (!view) {
    talk.append(bubble("response", "policy", row.text));
    detail.append(make("p", { class: "note" }, "Only the text of this response was kept: tokens are logged in the steps 1, 2, 4, 8, ... and the last."));
    return node;
  }
  const tokens = [];
  let body = null, turn = null;
  view.tokens.forEach((text, index) => {
    if (view.turns[index] !== turn) {
      turn = view.turns[index];
      const policy = turn >= 0;
      const box = bubble(policy ? (Math.max(...view.turns) > 0 ? `policy, turn ${turn + 1}` : "policy") : "environment", policy ? "policy" : "", "");
      body = box.lastChild;
      if (policy) body.setAttribute("role", "listbox");
      if (policy) body.setAttribute("aria-label", `tokens of the policy, ${title(row)}`);
      talk.append(box);
    }
    if (turn < 0) return body.append(text);
    const token = tokenNode(text, index, view, scale);
    token.addEventListener("focus", () => chooseBoth(token));
    token.addEventListener("pointerenter", () => chooseBoth(token));
    token.addEventListener("click", () => token.focus());
    token.addEventListener("keydown", (event) => step(event, token));
    tokens.push(token);
    body.append(token);
  });

  // The other response follows as far as it is the same text.
  function chooseBoth(token) {
    choose(token);
    const index = Number(token.dataset.index);
    views.forEach((other, place) => {
      if (!other || other === view || other.tokens.slice(0, index + 1).join() !== view.tokens.slice(0, index + 1).join()) return;
      followers[place]?.(index);
    });
  }

  function choose(token) {
    for (const other of tokens) {
      other.tabIndex = other === token ? 0 : -1;
      other.setAttribute("aria-selected", other === token);
    }
    detail.replaceChildren(...law(view, Number(token.dataset.index), views, row));
  }

  function step(event, token) {
    const at = tokens.indexOf(token);
    const to = { ArrowLeft: at - 1, ArrowRight: at + 1, ArrowUp: at - 10, ArrowDown: at + 10, Home: 0, End: tokens.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    tokens[Math.max(0, Math.min(tokens.length - 1, to))].focus();
  }

  followers[views.indexOf(view)] = (index) => {
    const token = tokens.find((one) => Number(one.dataset.index) === index);
    if (token) choose(token);
  };
  if (tokens.length) choose(tokens.reduce((a, b) => (strength(view, b) > strength(view, a) ? b : a)));
  return node;
}

// The token shown first is the one that stands out most.
function strength(view, token) {
  const value = (view[chosen.colour] || [])[Number(token.dataset.index)];
  return value === null || value === undefined ? -Infinity : Math.abs(value);
}

function bubble(role, kind, text) {
  return make("div", { class: `turn ${kind}` }, make("small", {}, role), make("div", { dir: "auto" }, text));
}

function tokenNode(text, index, view, scale) {
  const value = (view[chosen.colour] || [])[index];
  const shown = text === "" ? "·" : text.replace(/\n/g, "↵\n");
  const label = `${JSON.stringify(text)}, ${TITLES[chosen.colour]} ${number(value)}`;
  const special = /^<\|.*\|>$/.test(text) ? " special" : "";
  const node = make("span", { class: `tok${special}`, role: "option", tabindex: -1, "data-index": index, "aria-label": label }, shown);
  if (scale && value !== null && value !== undefined) {
    const [colour, part] = scale.paint(value);
    node.style.backgroundColor = `rgb(var(--${colour}) / ${(STRONGEST * part).toFixed(3)})`;
  }
  return node;
}

find("#colour").addEventListener("change", (event) => { chosen.colour = event.target.value; drawPanes(); });
find("#beside").addEventListener("change", (event) => { chosen.beside = Number(event.target.value); drawPanes(); });
