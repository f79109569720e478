// The value law of one token: figures, quantile function and histogram of all heads with the tails marked, and how the
// value moved along the response.
const W = 460, H = 230, TOP = 18, BOTTOM = 200, FIRST = 44, MIDDLE = 292, THIRD = 312, LAST = 448;

function law(view, index, views, row) {
  const facts = [
    ["advantage", view.advantages], ["value", view.value], ["width", view.width],
    [`lower ${share(view.alpha)}`, view.lower], [`upper ${share(view.beta)}`, view.upper],
  ].filter(([, column]) => column).map(([name, column]) => make("div", {}, make("dt", {}, name), make("dd", {}, number(column[index]))));
  const head = make("h4", {}, `Token ${index + 1} of ${view.tokens.length}: `, make("bdi", {}, JSON.stringify(view.tokens[index])));
  const parts = [head, make("dl", {}, ...facts)];
  if (view.value) parts.push(course(view, index, views));
  if (view.quantiles && view.quantiles[index][0].length > 1) parts.push(picture(view, index, views, row));
  else if (view.quantiles) parts.push(make("p", { class: "note" }, "A scalar critic: one number a head and no law to draw."));
  else parts.push(make("p", { class: "note" }, "This algorithm has no critic."));
  return parts;
}

const share = (mass) => (mass === undefined ? "" : `${number(100 * mass)}%`);

function span([low, high]) {
  const room = 0.06 * (high - low) || 0.1;
  return [low - room, high + room];
}

// V along the response with its tails, the token marked.
function course(view, index, views) {
  const places = view.value.map((value, i) => (value === null ? -1 : i)).filter((i) => i >= 0);
  const [low, high] = span(bounds(["value", "lower", "upper"].flatMap((name) => numbers(views, name))));
  const x = (i) => FIRST + ((LAST - FIRST) * places.indexOf(i)) / Math.max(places.length - 1, 1);
  const y = (v) => 8 + ((high - v) / (high - low)) * 48;
  const path = (column, list = places) => list.map((i) => `${x(i).toFixed(1)} ${y(column[i]).toFixed(1)}`).join("L");
  const band = view.upper ? [make("svg:path", { class: "band series-0", d: `M${path(view.upper)}L${path(view.lower, [...places].reverse())}Z` })] : [];
  return make("svg:svg", { viewBox: `0 0 ${W} 70`, role: "img", "aria-label": "value along the response" }, ...band,
    make("svg:path", { class: "line series-0", d: `M${path(view.value)}` }),
    make("svg:path", { class: "here", d: `M${x(index)} 4V60` }),
    label(FIRST - 6, y(high) + 8, "y", number(high, 2)), label(FIRST - 6, y(low), "y", number(low, 2)),
    label((FIRST + LAST) / 2, 70, "x", view.upper ? "value along the response, from lower to upper tail" : "value along the response"));
}

function picture(view, index, views, row) {
  const heads = view.quantiles[index];
  const atoms = views.flatMap((v) => (v && v.quantiles ? v.quantiles.flat(2) : [])).filter((x) => x !== null);
  const [low, high] = span(withOutcomes(bounds(atoms), row));
  const y = (value) => TOP + ((high - value) / (high - low)) * (BOTTOM - TOP);
  const x = (level) => FIRST + level * (MIDDLE - FIRST);
  const curve = (values) => `M${view.levels.map((level, i) => `${x(level).toFixed(1)} ${y(values[i]).toFixed(1)}`).join("L")}`;
  const ensemble = view.levels.map((_, i) => heads.reduce((sum, head) => sum + head[i], 0) / heads.length).sort((a, b) => a - b);
  const zone = (from, to, name) => make("svg:path", { class: `zone-${name}`, d: `M${x(from)} ${TOP}H${x(to)}V${BOTTOM}H${x(from)}Z` });
  const marks = [["true", row.true], ["observed", row.observed]].filter(([, value]) => value !== null && value > low && value < high);
  const together = marks.length === 2 && Math.abs(marks[0][1] - marks[1][1]) < 1e-6 ? [["true = observed", marks[0][1]]] : marks;
  const svg = make("svg:svg", { viewBox: `0 0 ${W} ${H}`, role: "img", class: "law", "aria-label": `quantile function and histogram of ${heads.length} heads` },
    zone(0, view.alpha, "lower"), zone(1 - view.beta, 1, "upper"), ...rules(low, high, y),
    ...heads.map((head) => make("svg:path", { class: "head", d: curve(head) })), make("svg:path", { class: "mean", d: curve(ensemble) }),
    ...histogram(view, heads, low, high, y),
    ...together.flatMap(([name, value]) => [make("svg:path", { class: "mark", d: `M${FIRST} ${y(value)}H${LAST}` }), label(MIDDLE - 4, y(value) + (y(value) < TOP + 12 ? 11 : -3), "y", name)]),
    ...[0, 0.5, 1].map((level) => label(x(level), BOTTOM + 13, "x", String(level))),
    label((FIRST + MIDDLE) / 2, H - 3, "x", "quantile function: level"), label((THIRD + LAST) / 2, H - 3, "x", `all ${heads.length} heads`));
  return svg;
}

// What came out belongs into the picture unless it lies far away.
function withOutcomes([low, high], row) {
  const near = [row.true, row.observed].filter((x) => x !== null && x > low - 2 * (high - low) && x < high + 2 * (high - low));
  return [Math.min(low, ...near), Math.max(high, ...near)];
}

// Many numbers: Math.min(...) would overflow the stack.
function bounds(values) {
  return [values.reduce((a, b) => Math.min(a, b), Infinity), values.reduce((a, b) => Math.max(a, b), -Infinity)];
}

function rules(low, high, y) {
  const power = 10 ** Math.floor(Math.log10((high - low) / 4));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => (high - low) / size <= 6);
  const parts = [];
  for (let value = Math.ceil(low / step) * step; value <= high; value += step) {
    parts.push(make("svg:path", { class: "grid", d: `M${FIRST} ${y(value)}H${LAST}` }), label(FIRST - 6, y(value) + 3.5, "y", number(value)));
  }
  return parts;
}

function histogram(view, heads, low, high, y) {
  const count = Math.max(8, Math.min(24, Math.round(heads.flat().length / 4)));
  const size = (high - low) / count;
  const bins = Array.from({ length: count }, () => ({ lower: 0, middle: 0, upper: 0 }));
  heads.forEach((head) => head.forEach((value, i) => {
    const kind = view.levels[i] <= view.alpha ? "lower" : view.levels[i] >= 1 - view.beta ? "upper" : "middle";
    bins[Math.max(0, Math.min(count - 1, Math.floor((value - low) / size)))][kind] += 1;
  }));
  const most = Math.max(...bins.map((bin) => bin.lower + bin.middle + bin.upper));
  return bins.flatMap((bin, i) => {
    let left = THIRD;
    return ["lower", "middle", "upper"].filter((kind) => bin[kind]).map((kind) => {
      const wide = (bin[kind] / most) * (LAST - THIRD);
      const bar = make("svg:path", { class: kind, d: `M${left} ${y(low + (i + 1) * size) + 0.5}h${wide}V${y(low + i * size) - 0.5}h${-wide}Z` });
      left += wide;
      return bar;
    });
  });
}

function label(x, y, kind, text) {
  return make("svg:text", { x, y, class: kind }, text);
}
