// The browser's side of the page: where pictures come from, what is kept, and what only a browser can do.

import { all, get, put, remove } from "llava_store";

const PREFERENCES = "local-llava.preferences";
const OPEN = "local-llava.open";
const DAY_MS = 24 * 60 * 60 * 1000;

const newId = () =>
  // crypto.randomUUID is missing on pages that came by plain http from another computer.
  Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");

const picturesOf = (conversation) => conversation.turns.flatMap((turn) => turn.pictures.map((picture) => picture.id));

export default {
  template: `
    <div>
      <input ref="files" type="file" multiple hidden accept="image/*,.heic,.heif,.avif,.tif,.tiff,.pdf"
        aria-label="Pictures" tabindex="-1" @change="chosen">
      <input ref="capture" type="file" hidden accept="image/*" capture="environment"
        aria-label="Camera" tabindex="-1" @change="chosen">
      <dialog ref="camera" class="llava-camera" aria-label="Camera" @close="cameraOff">
        <video ref="video" autoplay playsinline muted aria-label="What the camera sees"></video>
        <p v-if="trouble" role="alert">{{ trouble }}</p>
        <div>
          <button type="button" :disabled="!ready" @click="shoot">Take the picture</button>
          <button type="button" @click="$refs.camera.close()">Cancel</button>
        </div>
      </dialog>
    </div>
  `,
  props: { page: String, prefix: String, maxBytes: Number },
  data: () => ({ trouble: "", ready: false }),
  mounted() {
    this.listeners = [
      [document, "paste", this.pasted],
      [document, "dragover", this.dragged],
      [document, "dragleave", this.draggedOut],
      [document, "drop", this.dropped],
      [document, "keydown", this.pressed],
      [window, "scroll", this.scrolled],
      [window, "pagehide", this.left],
    ];
    for (const [target, event, handler] of this.listeners) target.addEventListener(event, handler);
    // While the end of the conversation is in view, it stays in view as an answer grows.
    this.atEnd = true;
    this.observer = new ResizeObserver(() => this.atEnd && this.toEnd());
    this.$nextTick(() => this.observer.observe(document.querySelector(".llava-turns")));
  },
  unmounted() {
    for (const [target, event, handler] of this.listeners) target.removeEventListener(event, handler);
    this.observer.disconnect();
    this.cameraOff();
  },
  methods: {
    // Where pictures come from.

    pick() {
      this.$refs.files.click();
    },
    chosen(event) {
      this.take(event.target.files);
      event.target.value = "";
    },
    pasted(event) {
      const files = event.clipboardData?.files;
      if (!files?.length) return;
      event.preventDefault();
      this.take(files);
    },
    dragged(event) {
      if (!event.dataTransfer?.types.includes("Files")) return;
      event.preventDefault();
      document.body.classList.add("llava-dropping");
    },
    draggedOut(event) {
      if (!event.relatedTarget) document.body.classList.remove("llava-dropping");
    },
    dropped(event) {
      document.body.classList.remove("llava-dropping");
      if (!event.dataTransfer?.files.length) return;
      event.preventDefault();
      this.take(event.dataTransfer.files);
    },
    async take(files) {
      for (const file of files) {
        const name = file.name || "picture";
        if (file.size > this.maxBytes) {
          this.$emit("trouble", `${name} is larger than ${Math.floor(this.maxBytes / 1e6)} MB, which the server takes`);
          continue;
        }
        const id = newId();
        // The bytes and not the file: that could change, or go, before they are asked for.
        const blob = new Blob([await file.arrayBuffer()], { type: file.type });
        const lasts = await put("pictures", { id, name, blob, taken: Date.now() });
        this.$emit("taken", { id, name });
        if (!lasts) this.$emit("trouble", "This browser has no room: what you do here is gone when you leave the page");
      }
    },

    // The camera.

    async photograph() {
      if (!navigator.mediaDevices?.getUserMedia) return this.$refs.capture.click();
      this.trouble = "";
      this.$refs.camera.showModal();
      try {
        const wanted = { video: { facingMode: "environment", width: { ideal: 1920 }, height: { ideal: 1080 } } };
        const stream = await navigator.mediaDevices.getUserMedia(wanted);
        if (!this.$refs.camera.open) return stream.getTracks().forEach((track) => track.stop());
        this.$refs.video.srcObject = stream;
        await this.$refs.video.play();
        this.ready = true;
      } catch (error) {
        this.trouble = `There is no camera to be had: ${error.message}`;
      }
    },
    async shoot() {
      const video = this.$refs.video;
      const canvas = Object.assign(document.createElement("canvas"), {
        width: video.videoWidth,
        height: video.videoHeight,
      });
      canvas.getContext("2d").drawImage(video, 0, 0);
      const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
      this.$refs.camera.close();
      await this.take([new File([blob], "photo.png", { type: "image/png" })]);
    },
    cameraOff() {
      this.ready = false;
      const stream = this.$refs.video?.srcObject;
      stream?.getTracks().forEach((track) => track.stop());
      if (stream) this.$refs.video.srcObject = null;
    },

    // What is kept.

    async start() {
      const conversations = await this.titles();
      const open = sessionStorage.getItem(OPEN);
      this.sweep();
      let preferences = null;
      try {
        preferences = JSON.parse(localStorage.getItem(PREFERENCES));
      } catch {
        // Not ours, or no storage at all.
      }
      return { conversations, preferences, open: open ? ((await get("conversations", open)) ?? null) : null };
    },
    async titles() {
      const conversations = await all("conversations");
      conversations.sort((a, b) => b.changed - a.changed);
      return conversations.map(({ id, title }) => ({ id, title }));
    },
    async open(id) {
      sessionStorage.setItem(OPEN, id);
      return (await get("conversations", id)) ?? null;
    },
    async keep(conversation) {
      sessionStorage.setItem(OPEN, conversation.id);
      await put("conversations", { ...conversation, changed: Date.now() });
    },
    close() {
      sessionStorage.removeItem(OPEN);
    },
    async drop(id) {
      const conversation = await get("conversations", id);
      await remove("conversations", id);
      if (conversation) for (const picture of picturesOf(conversation)) await remove("pictures", picture);
    },
    async sweep() {
      // Pictures that no conversation shows: they were taken away before they were asked about, or with their question.
      const shown = new Set((await all("conversations")).flatMap(picturesOf));
      for (const { id, taken } of await all("pictures")) {
        if (!shown.has(id) && taken < Date.now() - DAY_MS) await remove("pictures", id);
      }
    },
    keepPreferences(preferences) {
      localStorage.setItem(PREFERENCES, JSON.stringify(preferences));
    },

    // What is sent, and the rest.

    /** Send pictures to the server. Returns the first complaint, or "". */
    async send(ids) {
      for (const id of ids) {
        const kept = await get("pictures", id);
        if (!kept) return "a picture of this conversation is not in this browser any more";
        const answer = await fetch(`${this.prefix}/pictures/${this.page}/${id}`, {
          method: "POST",
          headers: { "Content-Type": "application/octet-stream" },
          body: kept.blob,
        }).catch(() => null);
        if (!answer?.ok) return `${kept.name} could not be sent: ${answer ? `status ${answer.status}` : "no connection"}`;
      }
      return "";
    },
    left() {
      // The server would see it, too, but after some seconds in which it writes for nobody.
      navigator.sendBeacon(`${this.prefix}/left/${this.page}`);
    },
    async copy(text) {
      if (navigator.clipboard) return navigator.clipboard.writeText(text);
      const area = Object.assign(document.createElement("textarea"), { value: text });
      document.body.append(area);
      area.select();
      document.execCommand("copy");
      area.remove();
    },
    pressed(event) {
      if (event.key === "Escape" && !document.querySelector("dialog[open], .q-dialog, .q-menu")) this.$emit("escape");
    },
    scrolled() {
      const page = document.documentElement;
      this.atEnd = page.scrollHeight - window.innerHeight - window.scrollY < 80;
    },
    focusQuestion() {
      // On a touch screen this would open the keyboard over the answer.
      if (matchMedia("(pointer: fine)").matches) document.querySelector(".llava-question textarea").focus();
    },
    toEnd() {
      this.atEnd = true;
      window.scrollTo(0, document.documentElement.scrollHeight);
    },
  },
};
