// The built page in a real browser, served by `mambavision demo`. CHROMIUM=... names the browser, PYTHON=... the
// interpreter that has mambavision; SCREENSHOTS=FOLDER keeps pictures of the page.

import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { mkdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import test, { after, before } from "node:test";
import { fileURLToPath } from "node:url";
import { chromium } from "playwright-core";

const expected = JSON.parse(readFileSync(new URL("expected.json", import.meta.url)));
const samples = fileURLToPath(new URL("../../src/mambavision/assets/samples/", import.meta.url));
const screenshots = process.env.SCREENSHOTS;
let server, browser, address;
const requests = [];
const problems = [];

before(async () => {
  const python = process.env.PYTHON ?? "python3";
  const dist = fileURLToPath(new URL("../dist", import.meta.url));
  server = spawn(python, ["-m", "mambavision", "demo", "--dir", dist, "--port", "0", "--no-browser"]);
  let errors = "";
  server.stderr.on("data", (data) => (errors += data));
  address = await new Promise((resolve, reject) => {
    let output = "";
    server.stdout.on("data", (data) => {
      output += data;
      const found = /http:\S+/.exec(output);
      if (output.includes("\n") && found !== null) resolve(found[0]);
    });
    server.on("exit", () => reject(new Error(errors)));
  });
  browser = await chromium.launch({
    executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
    args: ["--no-sandbox"],
  });
});

after(async () => {
  await browser?.close();
  server?.kill();
});

async function open(options = {}) {
  const page = await browser.newPage({ viewport: { width: 1100, height: 860 }, ...options });
  page.on("request", (request) => requests.push(request.url()));
  page.on("pageerror", (error) => problems.push(error.message));
  page.on("console", (line) => line.type() === "error" && problems.push(line.text()));
  await page.goto(address);
  await page.getByText(/^Ready/).waitFor({ timeout: 60_000 });
  return page;
}

async function keep(page, name) {
  if (screenshots === undefined) return;
  mkdirSync(screenshots, { recursive: true });
  await page.screenshot({ path: join(screenshots, name), fullPage: true });
}

/** As if files were dropped from the desktop. */
async function dropFile(page, name, content) {
  const transfer = await page.evaluateHandle(
    ([name, bytes]) => {
      const data = new DataTransfer();
      data.items.add(new File([Uint8Array.from(atob(bytes), (letter) => letter.charCodeAt(0))], name));
      return data;
    },
    [name, content.toString("base64")],
  );
  await page.dispatchEvent("#drop", "drop", { dataTransfer: transfer });
}

async function results(page, name) {
  await page.locator("#message", { hasText: new RegExp(`^${name.replaceAll(".", "\\.")}$`) }).waitFor();
  return page.$$eval("#bars button", (buttons) =>
    buttons.map((button) => [button.querySelector(".label").textContent, Number(button.dataset.probability)]),
  );
}

function seen(page) {
  return page.$eval("#seen", (canvas) => [
    ...canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data.filter((_, place) => place % 4 < 3),
  ]);
}

test("every sample photograph gets the classes that PyTorch gives it", async () => {
  const page = await open();
  await keep(page, "empty.png");
  for (const [name, { probabilities, rgb }] of Object.entries(expected.samples)) {
    await dropFile(page, name, readFileSync(join(samples, name)));
    const found = await results(page, name);
    assert.equal(found.length, 5);
    const best = Object.entries(probabilities).sort((a, b) => b[1] - a[1])[0][0];
    assert.equal(found[0][0], best, name);
    for (const [label, probability] of found) {
      assert.ok(Math.abs(probability - probabilities[label]) < 0.02, `${name}: ${label} ${probability}`);
    }
    const theirs = Buffer.from(rgb, "base64");
    const differences = (await seen(page)).map((value, place) => Math.abs(value - theirs[place]));
    assert.ok(Math.max(...differences) <= 2, `${name}: pixels differ by ${Math.max(...differences)}`);
  }
  await keep(page, "result.png");
  await page.close();
});

test("a picked file, a sample, another class, and the picture without colours", async () => {
  const page = await open();
  await page.setInputFiles("#file", join(samples, "dog.jpg"));
  assert.equal((await results(page, "dog.jpg"))[0][0], "dog");
  assert.match(await page.textContent("#time"), /^[\d.]+ ms to prepare, [\d.]+ ms to classify$/);
  const before = await page.$eval("#heat", (canvas) => canvas.toDataURL());
  await page.locator("#bars button").nth(1).click();
  assert.notEqual(await page.$eval("#heat", (canvas) => canvas.toDataURL()), before);
  assert.equal(await page.textContent("#subject"), await page.locator("#bars .label").nth(1).textContent());
  await page.uncheck("#looked");
  assert.equal(await page.$eval("#drop", (drop) => drop.classList.contains("looking")), false);
  await page.locator("[data-sample='horse.jpg']").click();
  assert.equal((await results(page, "horse.jpg"))[0][0], "horse");
  await page.close();
});

test("what is broken, empty or no picture is named, and the next picture works", async () => {
  const page = await open();
  const cat = readFileSync(join(samples, "cat.jpg"));
  const bad = {
    "broken.jpg": cat.subarray(0, 300),
    "cut.jpg": cat.subarray(0, 9000),
    "empty.png": Buffer.alloc(0),
    "notes.txt": Buffer.from("no photo"),
  };
  for (const [name, content] of Object.entries(bad)) {
    await dropFile(page, name, content);
    const message = page.locator("#message.error", { hasText: name });
    await message.waitFor();
    assert.match(await message.textContent(), /is empty\.|is broken, or not a picture that this browser can read\./);
    assert.equal(await page.locator("#bars button").count(), 0);
  }
  await keep(page, "broken.png");
  await dropFile(page, "cat.jpg", cat);
  assert.equal((await results(page, "cat.jpg"))[0][0], "cat");
  await page.close();
});

test("a photo that its EXIF data turn is seen upright, and a transparent one on white", async () => {
  const page = await open();
  const cat = readFileSync(join(samples, "cat.jpg"));
  await dropFile(page, "upright.jpg", cat);
  await results(page, "upright.jpg");
  const upright = await seen(page);
  // An APP1 segment with the one entry "orientation 3", upside down.
  const exif = Buffer.from("ffe1002245786966000049492a0008000000010012010300010000000300000000000000", "hex");
  await dropFile(page, "turned.jpg", Buffer.concat([cat.subarray(0, 2), exif, cat.subarray(2)]));
  await results(page, "turned.jpg");
  const turned = await seen(page);
  const pixels = upright.length / 3;
  const differences = upright.map((value, place) => {
    const opposite = 3 * (pixels - 1 - Math.floor(place / 3)) + (place % 3);
    return Math.abs(value - turned[opposite]);
  });
  assert.ok(differences.reduce((a, b) => a + b) / differences.length < 2);

  const clear = await page.evaluate(async () => {
    const canvas = new OffscreenCanvas(40, 40);
    canvas.getContext("2d").clearRect(0, 0, 40, 40);
    const blob = await canvas.convertToBlob();
    return String.fromCharCode(...new Uint8Array(await blob.arrayBuffer()));
  });
  await dropFile(page, "clear.png", Buffer.from(clear, "latin1"));
  await results(page, "clear.png");
  assert.ok((await seen(page)).every((value) => value === 255));
  await page.close();
});

test("it works in the dark, on a phone, and with threads", async () => {
  const page = await open({ colorScheme: "dark", viewport: { width: 390, height: 844 } });
  await page.locator("[data-sample='duck.jpg']").click();
  assert.equal((await results(page, "duck.jpg"))[0][0], "bird");
  assert.equal(await page.evaluate(() => crossOriginIsolated), true);
  assert.equal(await page.evaluate(() => document.documentElement.scrollWidth <= innerWidth), true);
  await keep(page, "dark-phone.png");
  await page.close();
});

test("nothing was asked of another server, and nothing went wrong", () => {
  assert.ok(requests.length > 20);
  assert.deepEqual(requests.filter((url) => !url.startsWith(address) && !/^(blob|data):/.test(url)), []);
  assert.deepEqual(problems, []);
});
