// Screenshots of a running Open WebUI for the guide: a knowledge base, and the embedding settings.
//
//   npm install playwright-core && apt-get install chromium
//   node tools/deploy/open_webui_screenshots.mjs http://127.0.0.1:3000 EMAIL PASSWORD docs/images/open-webui

import { mkdirSync } from "node:fs";
import { chromium } from "playwright-core";

const [base, email, password, folder] = process.argv.slice(2);
mkdirSync(folder, { recursive: true });

async function call(token, route, options = {}) {
  const headers = { Authorization: `Bearer ${token}`, ...options.headers };
  const answer = await fetch(`${base}/api/v1${route}`, { ...options, headers });
  if (!answer.ok) throw new Error(`${route}: ${answer.status} ${await answer.text()}`);
  return answer.json();
}

const json = (body) => ({
  method: "POST",
  body: JSON.stringify(body),
  headers: { "Content-Type": "application/json" },
});
const { token } = await call("", "/auths/signin", json({ email, password }));
const description = "Documents embedded by Qwen3-Embedding on vLLM.";
const knowledge = await call(token, "/knowledge/create", json({ name: "Plants", description }));
for (const name of ["photosynthesis.txt", "roots.txt"]) {
  const form = new FormData();
  form.append("file", new Blob([`Facts about plants (${name}): leaves make sugar.`]), name);
  const { id } = await call(token, "/files/", { method: "POST", body: form });
  let status = "pending";
  while (!["completed", "failed"].includes(status)) {
    await new Promise((resolve) => setTimeout(resolve, 500));
    ({ status } = await call(token, `/files/${id}/process/status`));
  }
  await call(token, `/knowledge/${knowledge.id}/file/add`, json({ file_id: id }));
}

const browser = await chromium.launch({
  executablePath: "/usr/bin/chromium",
  args: ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"],
});
const page = await browser.newPage({ viewport: { width: 1200, height: 640 } });
await page.addInitScript((value) => localStorage.setItem("token", value), token);
for (const [name, route] of [
  ["knowledge", `/workspace/knowledge/${knowledge.id}`],
  ["settings", "/admin/settings/documents"],
]) {
  await page.goto(base + route, { waitUntil: "load", timeout: 120000 });
  await page.waitForTimeout(15000);
  const close = page.getByRole("button", { name: /okay, let's go/i });
  if (await close.isVisible().catch(() => false)) await close.click();
  if (name === "settings") {
    await page.getByText("Embedding", { exact: true }).first().evaluate((e) => e.scrollIntoView());
  }
  await page.waitForTimeout(2000);
  await page.screenshot({ path: `${folder}/${name}.png` });
}
await browser.close();
