// The search runs in a worker, and browsers refuse workers to pages opened from a folder (file://).
// There a hidden frame does its work. On a server this file does nothing.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(script) {
      super()
      this.frame = document.createElement("iframe")
      this.frame.hidden = true
      document.body.append(this.frame)
      this.inside = this.frame.contentWindow
      window.addEventListener("message", (event) => {
        if (event.source !== this.inside) return
        event.stopImmediatePropagation()
        const message = new MessageEvent("message", { data: event.data })
        this.dispatchEvent(message)
        if (this.onmessage) this.onmessage(message)
      })
      const page = this.inside.document
      page.open()
      page.write(
        "<script>postMessage = (data) => parent.postMessage(data, '*')</" + "script>" +
        '<script src="' + script + '"></' + "script>"
      )
      page.close()
    }
    postMessage(data) {
      this.inside.dispatchEvent(new MessageEvent("message", { data: data }))
    }
    terminate() {
      this.frame.remove()
    }
  }
}
