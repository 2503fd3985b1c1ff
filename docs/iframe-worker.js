// Search in pages that are opened from disk. A browser starts no worker from a `file:` address, so there
// the theme's search runs in a hidden frame, which answers to the same calls as a worker.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(address) {
      super();
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      this.ready = new Promise((resolve) => {
        this.frame.addEventListener("load", () => resolve(this.start(address)), { once: true });
      });
      document.body.append(this.frame);
    }

    // The window of the frame once its script is loaded.
    start(address) {
      const inside = this.frame.contentWindow;
      inside.postMessage = (data) => {
        setTimeout(() => this.dispatchEvent(new MessageEvent("message", { data })));
      };
      const script = inside.document.createElement("script");
      script.src = address;
      inside.document.body.append(script);
      return new Promise((resolve) => {
        script.addEventListener("load", () => resolve(inside), { once: true });
      });
    }

    postMessage(data) {
      this.ready.then((inside) => inside.dispatchEvent(new MessageEvent("message", { data })));
    }

    terminate() {
      this.frame.remove();
    }
  };
}
