// A picture that this browser keeps. What the browser cannot show (HEIC, PDF) is named instead; the model sees it.

import { get } from "llava_store";

export default {
  template: `
    <span class="llava-picture">
      <img v-if="url && !odd" :src="url" :alt="'Picture ' + name" @error="odd = true">
      <span v-else class="llava-file" role="img" :aria-label="'Picture ' + name">{{ gone ? name + " is gone" : name }}</span>
      <slot></slot>
    </span>
  `,
  props: { picture: String, name: String },
  data: () => ({ url: null, odd: false, gone: false }),
  async mounted() {
    const kept = await get("pictures", this.picture);
    if (kept && !this.left) this.url = URL.createObjectURL(kept.blob);
    else this.gone = !kept;
  },
  unmounted() {
    this.left = true;
    if (this.url) URL.revokeObjectURL(this.url);
  },
};
