// The page opens with its last token view, two runs side by side where they share the prompt.
function first() {
  const rows = data.completions.map((row, index) => ({ ...row, index }));
  const viewed = rows.filter((row) => row.view >= 0).sort((a, b) => b.step - a.step || a.run - b.run || a.sample - b.sample);
  const paired = viewed.filter((row) => data.completions[counterpart(row.index)]?.view >= 0);
  return (paired[0] ?? viewed[0] ?? rows.at(-1)).index;
}

if (data.completions.length) openRow(first(), false);
else find("#tokens").replaceChildren(make("h2", {}, "Token by token"), make("p", { class: "none" }, "No responses were kept."));
