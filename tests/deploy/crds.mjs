// Holds objects of KEDA, Gateway API and the Prometheus operator against their CRDs' schemas:
//     CRD_MODELS=DIRECTORY node crds.mjs OBJECTS.json      (DIRECTORY/node_modules has the packages)
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { pathToFileURL } from "node:url";

const packages = {
  "keda.sh": "keda",
  "gateway.networking.k8s.io": "gateway-api",
  "monitoring.coreos.com": "prometheus-operator",
};
for (const object of JSON.parse(readFileSync(process.argv[2]))) {
  const home = join(
    process.env.CRD_MODELS, "node_modules", "@kubernetes-models", packages[object.apiVersion.split("/")[0]]);
  const exported = JSON.parse(readFileSync(join(home, "package.json"))).exports;
  const file = join(home, exported[`./${object.apiVersion}`].import);
  const models = await import(pathToFileURL(file));
  new models[object.kind](object).validate();
}
