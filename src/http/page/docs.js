// Renders /openapi.json: one section per tag, one line per operation, with the fields of its request.

function make(tag, text, ...children) {
  const element = document.createElement(tag);
  element.textContent = text;
  element.append(...children);
  return element;
}

/** The type of a field and its limits, as text. */
function typeText({ type, format, enum: values, minimum, maximum, contentEncoding }) {
  if (values) return values.filter(value => value !== null).join(" | ");
  const name = contentEncoding ?? (format === "binary" ? "file" : [type].flat().filter(name => name !== "null").join(" or "));
  if (minimum === undefined) return name;
  return maximum === undefined ? `${name}, minimum ${minimum}` : `${name}, ${minimum} to ${maximum}`;
}

function fields(schema) {
  const table = make("table", "");
  for (const [name, field] of Object.entries(schema.properties ?? {})) {
    const cell = make("td", field.description ?? "");
    const required = schema.required?.includes(name) ? " *" : "";
    table.append(make("tr", "", make("th", name + required), make("td", typeText(field)), cell));
  }
  return table;
}

function operation(method, path, { summary, requestBody }) {
  const line = make("summary", "", make("code", `${method.toUpperCase()} ${path}`), make("span", summary));
  const details = make("details", "", line);
  for (const [type, { schema }] of Object.entries(requestBody?.content ?? {})) {
    details.append(make("p", type), fields(schema));
  }
  if (!requestBody) details.append(make("p", "no request body"));
  return details;
}

try {
  const reply = await fetch("openapi.json");
  const document_ = await reply.json();
  if (!reply.ok) throw new Error(document_.error.message);
  document.getElementById("model").textContent = `${document_.info.description} Version ${document_.info.version}.`;
  for (const { name } of document_.tags) {
    const section = make("section", "", make("h2", name));
    for (const [path, methods] of Object.entries(document_.paths)) {
      for (const [method, one] of Object.entries(methods)) {
        if (one.tags.includes(name)) section.append(operation(method, path, one));
      }
    }
    document.querySelector("main").append(section);
  }
} catch (error) {
  document.getElementById("model").textContent = error.message;
}
