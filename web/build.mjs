// Makes dist/: the page, onnxruntime's WebAssembly, the sample photographs and the model. Needs Python with
// mambavision[export] for the last; PYTHON=... chooses the interpreter.

import { spawnSync } from "node:child_process";
import { cpSync, mkdirSync, readdirSync, rmSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { build } from "esbuild";

const here = dirname(fileURLToPath(import.meta.url));
const dist = join(here, "dist");
const runtime = join(here, "node_modules", "onnxruntime-web", "dist");
const samples = join(here, "..", "src", "mambavision", "assets", "samples");

rmSync(dist, { recursive: true, force: true });
mkdirSync(join(dist, "samples"), { recursive: true });
await build({
  entryPoints: [join(here, "src", "main.js"), join(here, "src", "style.css")],
  outdir: dist,
  bundle: true,
  minify: true,
  format: "esm",
  target: "es2022",
  conditions: ["onnxruntime-web-use-extern-wasm"],
  logLevel: "warning",
});
cpSync(join(here, "src", "index.html"), join(dist, "index.html"));
for (const name of ["ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"]) {
  cpSync(join(runtime, name), join(dist, name));
}
for (const name of readdirSync(samples).filter((file) => file.endsWith(".jpg"))) {
  cpSync(join(samples, name), join(dist, "samples", name));
}
const python = process.env.PYTHON ?? "python3";
const model = spawnSync(python, [join(here, "build_model.py"), dist], { stdio: "inherit" });
if (model.status !== 0) {
  rmSync(dist, { recursive: true, force: true });
  console.error(
    `The model was not exported by ${python}: pip install -e ".[export]" in the repository, or name another PYTHON.`,
  );
  process.exit(1);
}
