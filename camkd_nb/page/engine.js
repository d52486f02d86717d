// The networks. `camkdEngine` is the body of a worker: the page turns its text into one, together with the runtime,
// since a page that is opened from a folder may load neither workers nor modules from files.
// Messages in:  {start: {networks, runtime, size, background}}, then {picture, chosen, id} again and again, each
//               after the end of the one before; chosen: a class, or null for the largest in the first answer
// Messages out: {result, k, chosen} for each network, {end: id} after the last, {failed: text}
function camkdEngine() {
  let side, background, latest = null, chain
  const loaded = []

  async function unpacked(text) {
    const packed = await fetch('data:application/octet-stream;base64,' + text)
    return new Response(packed.body.pipeThrough(new DecompressionStream('gzip'))).arrayBuffer()
  }

  async function start({networks, runtime, size, ...rest}) {
    [side, background] = [size, rest.background]
    ort.env.wasm.numThreads = 1  // more need headers that only a server sends
    ort.env.wasm.wasmPaths = {mjs: URL.createObjectURL(new Blob([runtime.loader], {type: 'text/javascript'}))}
    ort.env.wasm.wasmBinary = await unpacked(runtime.wasm)
    for (const {name, layer, model} of networks) {
      const session = await ort.InferenceSession.create(new Uint8Array(await unpacked(model)))
      loaded.push({name, layer, session})
      if (latest) await ask(loaded.length - 1, latest)  // the first answer need not wait for the last network
    }
  }

  // RGBA bytes to planes of 0 to 1; the networks normalise by themselves
  function planes(picture) {
    const n = side * side, values = new Float32Array(3 * n)
    for (let c = 0; c < 3; c++)
      for (let i = 0; i < n; i++) values[c * n + i] = picture[4 * i + c] / 255
    return new ort.Tensor('float32', values, [1, 3, side, side])
  }

  // one forward pass: logits, and the map of a class whose score is summed over a region
  function run(network, region, chosen) {
    return network.session.run({
      image: network.image, region: new ort.Tensor('bool', region, [1, side, side]),
      class: new ort.Tensor('int64', BigInt64Array.of(BigInt(chosen)), [1])})
  }

  function largest(logits) {
    const n = side * side, classes = logits.dims[1], answer = new Uint8Array(n), best = logits.data.slice(0, n)
    for (let c = 1; c < classes; c++)
      for (let i = 0; i < n; i++)
        if (logits.data[c * n + i] > best[i]) [best[i], answer[i]] = [logits.data[c * n + i], c]
    return answer
  }

  function largestClass(answer) {
    const counts = {}
    for (const c of answer) if (c !== background) counts[c] = (counts[c] || 0) + 1
    return +(Object.keys(counts).sort((a, b) => counts[b] - counts[a])[0] ?? (background === 0 ? 1 : 0))
  }

  async function ask(k, question) {
    const network = loaded[k], begin = performance.now(), all = new Uint8Array(side * side).fill(1)
    if (network.asked === question) return
    const fresh = network.id !== question.id
    if (fresh) {
      network.image = planes(question.picture)
      network.answer = largest((await run(network, all, question.chosen ?? 0)).logits)
    }
    question.chosen ??= largestClass(network.answer)
    const chosen = question.chosen, inside = network.answer.map(c => c === chosen), whole = !inside.includes(1)
    const map = (await run(network, whole ? all : inside, chosen))[`maps.${network.layer}`]
    Object.assign(network, {asked: question, id: question.id})
    const result = {name: network.name, answer: network.answer, whole, map: map.data, shape: map.dims.slice(-2)}
    postMessage({result, k, chosen, ms: fresh ? performance.now() - begin : null})
  }

  async function askAll(question) {
    for (const k of loaded.keys()) await ask(k, question)
    postMessage({end: question.id})
  }

  onmessage = ({data}) => {
    if (!data.start) latest = data
    chain = (data.start ? start(data.start) : chain.then(() => askAll(data)))
    chain.catch(error => postMessage({failed: String(error)}))
  }
}
