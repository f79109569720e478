// The table of completions: searched, filtered and sorted here, shown a page at a time.
const PAGE = 25;
const CLIP = 220;
const SAME = 1e-6;

function promptText(row) {
  return data.prompts[row.prompt].map((message) => message.text).join(" ");
}

function differs(row) {
  return row.observed !== null && row.true !== null && Math.abs(row.observed - row.true) > SAME;
}

function shortened(text) {
  const line = text.replace(/\s+/g, " ").trim();
  return line.length > CLIP ? `${line.slice(0, CLIP)}…` : line || "(empty)";
}

// A filter of few values offers each of them, one of many their halves.
function choices(select, key) {
  const known = data.completions.map((row) => row[key]).filter((value) => value !== null);
  const values = [...new Set(known)].sort((a, b) => a - b);
  const tests = new Map([["", () => true]]);
  const add = (name, test) => { tests.set(name, test); select.append(make("option", { value: name }, name)); };
  select.append(make("option", { value: "" }, "any"));
  if (values.length <= 6) values.forEach((value) => add(number(value), (x) => x === value));
  else {
    const middle = known.sort((a, b) => a - b)[known.length >> 1];
    add(`at least ${number(middle)}`, (x) => x !== null && x >= middle);
    add(`below ${number(middle)}`, (x) => x !== null && x < middle);
  }
  if (known.length < data.completions.length) add("missing", (x) => x === null);
  return tests;
}

function completionsTable() {
  const columns = [
    ["run", "Run", (row) => row.run], ["step", "Step", (row) => row.step], ["", "Prompt"], ["", "Completion"],
    ["observed", "Observed", (row) => row.observed], ["true", "True", (row) => row.true], ["view", "Tokens", (row) => row.view],
  ];
  const observed = choices(find("#of-observed"), "observed");
  const truth = choices(find("#of-true"), "true");
  find("#of-run").append(make("option", { value: "" }, "any"), ...data.runs.map((name, i) => make("option", { value: i }, name)));
  const texts = data.completions.map((row) => `${promptText(row)}\n${row.text}`.toLowerCase());
  let order = { key: "step", descending: true }, shown = PAGE, kept = [];

  const heads = columns.map(([key, title]) => {
    if (!key) return make("th", { scope: "col", class: "text" }, title);
    const sort = () => { order = { key, descending: order.key === key ? !order.descending : true }; update(); };
    return make("th", { scope: "col", "data-key": key }, make("button", { type: "button", onclick: sort }, title));
  });
  find("#rows thead tr").append(...heads);

  function line(index) {
    const row = data.completions[index];
    const fact = (label, value, name = "") => make("td", { class: `fact ${name}`, "data-label": label }, value);
    const open = make("button", { type: "button", class: "open", dir: "auto", onclick: () => openRow(index, true) }, shortened(row.text));
    return make("tr", { "data-row": index, class: differs(row) ? "differ" : null },
      fact("run", data.runs[row.run]), fact("step", String(row.step)),
      make("td", { class: "words-cell prompt", dir: "auto" }, shortened(promptText(row))), make("td", { class: "words-cell" }, open),
      fact("observed", number(row.observed)), fact("true", number(row.true), "true"), fact("tokens", row.view < 0 ? "–" : "yes"));
  }

  function draw() {
    find("#rows tbody").replaceChildren(...kept.slice(0, shown).map(line));
    find("#more").hidden = kept.length <= shown;
    markChosen();
  }

  function update() {
    const words = find("#search").value.toLowerCase(), run = find("#of-run").value, agreement = find("#of-mismatch").value;
    const seen = observed.get(find("#of-observed").value), real = truth.get(find("#of-true").value);
    const withView = find("#of-view").checked;
    kept = data.completions.map((_, index) => index).filter((index) => {
      const row = data.completions[index];
      return texts[index].includes(words) && (run === "" || row.run === Number(run)) && seen(row.observed) && real(row.true)
        && (agreement !== "differ" || differs(row)) && (agreement !== "agree" || (row.observed !== null && row.true !== null && !differs(row)))
        && (!withView || row.view >= 0);
    });
    const value = columns.find(([key]) => key === order.key)[2];
    const rank = (index) => value(data.completions[index]) ?? -Infinity;
    kept.sort((a, b) => (order.descending ? rank(b) - rank(a) : rank(a) - rank(b)) || a - b);
    heads.forEach((head) => {
      if (!head.dataset.key) return;
      head.setAttribute("aria-sort", head.dataset.key === order.key ? (order.descending ? "descending" : "ascending") : "none");
    });
    find("#count").textContent = `${kept.length} of ${data.completions.length} completions; open one to see it below.`;
    shown = PAGE;
    draw();
  }

  find("#more").addEventListener("click", () => { shown += 4 * PAGE; draw(); });
  find("#filters").addEventListener("submit", (event) => event.preventDefault());
  find("#filters").addEventListener("input", update);
  update();
}

function markChosen() {
  all("#rows tr.chosen").forEach((tr) => tr.classList.remove("chosen"));
  const tr = find(`#rows tr[data-row="${chosen.main}"]`);
  if (tr) tr.classList.add("chosen");
}

if (find("#rows")) completionsTable();
