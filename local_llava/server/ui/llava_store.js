// What the page keeps in the browser: conversations and pictures, in IndexedDB.
//
// IndexedDB and not localStorage: that holds five megabytes of text, and pictures are kept as they are, byte for byte,
// since an answer depends on every pixel. Where IndexedDB is missing or full, things are kept until the page is left.

const STORES = ["conversations", "pictures"];
const memory = Object.fromEntries(STORES.map((name) => [name, new Map()]));
let opening;

function database() {
  opening ??= new Promise((resolve) => {
    try {
      const request = indexedDB.open("local-llava", 1);
      request.onupgradeneeded = () => {
        for (const name of STORES) request.result.createObjectStore(name, { keyPath: "id" });
      };
      request.onsuccess = () => resolve(request.result);
      request.onerror = request.onblocked = () => resolve(null);
    } catch {
      resolve(null);
    }
  });
  return opening;
}

async function transact(name, mode, work) {
  const db = await database();
  if (!db) throw new Error("no IndexedDB");
  return new Promise((resolve, reject) => {
    const transaction = db.transaction(name, mode);
    const request = work(transaction.objectStore(name));
    transaction.oncomplete = () => resolve(request.result);
    transaction.onerror = transaction.onabort = () => reject(transaction.error ?? request.error);
  });
}

/** Keep a value by its `id`. False if it lasts only until the page is left. */
export async function put(name, value) {
  try {
    await transact(name, "readwrite", (store) => store.put(value));
    memory[name].delete(value.id);
    return true;
  } catch {
    memory[name].set(value.id, value);
    return false;
  }
}

export async function get(name, id) {
  if (memory[name].has(id)) return memory[name].get(id);
  return transact(name, "readonly", (store) => store.get(id)).catch(() => undefined);
}

export async function all(name) {
  const kept = await transact(name, "readonly", (store) => store.getAll()).catch(() => []);
  return [...kept.filter((value) => !memory[name].has(value.id)), ...memory[name].values()];
}

export async function remove(name, id) {
  memory[name].delete(id);
  await transact(name, "readwrite", (store) => store.delete(id)).catch(() => undefined);
}
