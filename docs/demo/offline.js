// Keeps the page's files, so that it opens without a network too. Another version has another sum, and a place of its own.
const FILES = ["app.js", "biper.js", "image.js", "index.html", "network.bin", "paper.js", "pictures.js", "plain.wasm", "simd.wasm", "style.css"];
const PLACE = `biper ${self.registration.scope} `;
const VERSION = `${PLACE}51881234ef872483`;

self.addEventListener("install", (event) => {
  const requests = ["./", ...FILES].map((file) => new Request(file, { cache: "reload" }));
  event.waitUntil(caches.open(VERSION).then((cache) => cache.addAll(requests)));
});

self.addEventListener("activate", (event) => {
  const old = (name) => name.startsWith(PLACE) && name !== VERSION;
  event.waitUntil(caches.keys().then((names) => Promise.all(names.filter(old).map((name) => caches.delete(name)))));
});

self.addEventListener("fetch", (event) => {
  const kept = caches.open(VERSION).then((cache) => cache.match(event.request, { ignoreSearch: true }));
  event.respondWith(kept.then((found) => found || fetch(event.request)));
});
