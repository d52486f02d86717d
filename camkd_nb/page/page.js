// The page: tools, classes and panels. For tests and the curious, `camkd` is at hand in the browser's console:
//   await camkd.settled()  resolves when all that was painted is answered, and gives
//   {size, chosen, pixels, networks: [{name, answer, whole, map, shape}]}
//     pixels: RGBA, 0 to 255; answer: a class index a pixel; map: raw values, row by row, of the shape [h, w];
//     whole: whether the score was summed over the whole picture, since no pixel is answered as the chosen class
'use strict'

const camkd = (() => {
  const {size, vocab, colours, background, ramp, examples} = camkdData
  const byId = id => document.getElementById(id)
  const made = (tag, options = {}, ...inside) => {
    const element = Object.assign(document.createElement(tag), options)
    element.append(...inside)
    return element
  }
  const percent = share => `${Math.round(100 * share)}\u00a0%`
  const state = {chosen: null, id: 0, sent: null, wanted: null, results: []}  // chosen: null until an answer is there
  const waiting = []

  // choices: radio buttons, so that arrow keys work and screen readers count them
  function choice(group, value, look, checked, chosen) {
    const input = made('input', {type: 'radio', name: group, value, checked})
    input.addEventListener('change', () => chosen(value))
    byId(group).append(made('label', {className: 'chip'}, input, ...look))
    return input
  }

  function icon(tool) {  // 28 × 28
    const [svg, path] = ['svg', 'path'].map(tag => document.createElementNS('http://www.w3.org/2000/svg', tag))
    const at = value => (14 + 11 * value).toFixed(1)
    const line = corners => corners.map(point => point.map(at).join(' ')).join('L')
    path.setAttribute('d', (shapes[tool] || [regular(24, .45)]).map(corners => `M${line(corners)}Z`).join(''))
    path.setAttribute('fill-rule', 'evenodd')
    svg.setAttribute('viewBox', '0 0 28 28')
    svg.setAttribute('aria-hidden', 'true')
    svg.append(path)
    return svg
  }

  const swatch = colour => made('span', {className: 'swatch', style: `background: rgb(${colour})`})
  const hidden = text => made('span', {className: 'unseen', textContent: text})

  // panels
  const counted = n => (n < 1e5 ? `${(n / 1e3).toPrecision(2)} thousand` : `${(n / 1e6).toPrecision(2)} million`)

  function panel({name, parameters}) {
    const parts = {weights: `${counted(parameters)} weights`, cost: made('p', {className: 'cost'})}
    for (const row of ['answer', 'map']) {
      parts[row] = made('canvas', {width: size, height: size})
      parts[row].setAttribute('role', 'img')
      parts[row].ariaLabel = `The ${row} of the ${name} is not there yet`
    }
    for (const line of ['said', 'told', 'like']) parts[line] = made('p')
    parts.cost.textContent = parts.weights
    const {cost, answer, said, map, told, like} = parts, title = made('h3', {textContent: name})
    byId('networks').append(made('article', {className: 'network'}, title, cost, answer, said, map, told, like))
    return parts
  }

  function shares(answer) {  // [class, share], largest first, without background
    const counts = vocab.map(() => 0)
    for (const c of answer) counts[c] += 1 / answer.length
    const all = counts.map((share, c) => [c, share]), told = all.filter(([c, share]) => share >= .005 && c !== background)
    return told.sort((a, b) => b[1] - a[1])
  }

  function place(map, [height, width]) {  // in words, where a map is largest
    const best = map.indexOf(Math.max(...map)), [row, column] = [Math.floor(best / width), best % width]
    const third = (at, n, names) => names[Math.min(2, Math.floor(3 * (at + .5) / n))]
    const words = [third(row, height, ['top', '', 'bottom']), third(column, width, ['left', '', 'right'])]
    return words.filter(Boolean).join(' ') || 'middle'
  }

  const same = (a, b) => a.reduce((count, c, i) => count + (c === b[i]), 0) / a.length
  function cosine(a, b) {
    if (a.length !== b.length) return null
    const dot = (u, v) => u.reduce((sum, value, i) => sum + value * v[i], 0)
    return dot(a, b) / Math.sqrt(Math.max(dot(a, a) * dot(b, b), 1e-30))
  }

  const sentence = found =>
    found.slice(0, 3).map(([c, share]) => `${vocab[c]} ${percent(share)}`).join(', ') || 'background only'

  const labelled = (label, text) => [made('b', {textContent: label}), ` ${text}`]

  function likeness(result, first) {
    const maps = cosine(result.map, first.map)
    return `answers ${percent(same(result.answer, first.answer))}` + (maps === null ? '' : `, maps ${maps.toFixed(2)}`)
  }

  function showResult(result, k, ms) {
    const parts = panels[k], {picture, chosen} = state.sent, first = state.results[0]
    const found = sentence(shares(result.answer)), where = `most at the ${place(result.map, result.shape)}`
    const told = result.whole ? `no ${vocab[chosen]} found, so of the whole picture` : where
    showAnswer(parts.answer, picture, result.answer, camkdData)
    showMap(parts.map, picture, result, chosen, camkdData)
    parts.found = found
    parts.said.replaceChildren(...labelled('Answer', found))
    parts.told.replaceChildren(...labelled('Map', told))
    if (k) parts.like.replaceChildren(...labelled(`Like the ${first.name}`, likeness(result, first)))
    if (ms) parts.cost.textContent = `${parts.weights}, ${Math.round(ms)} ms`
    parts.answer.ariaLabel = `Answer of the ${result.name}: ${found}`
    parts.map.ariaLabel = `Map of the ${result.name} for ${vocab[chosen]}, ${where}`
  }

  function announce() {  // for those who hear the page, when the hand rests
    clearTimeout(announce.later)
    announce.later = setTimeout(() => {
      byId('status').className = 'unseen'  // others see it in the panels
      byId('status').textContent = state.results.map(({name}, k) => `${name}: ${panels[k].found}.`).join(' ')
    }, 700)
    for (const [c, input] of inputs.entries())
      input.parentElement.classList.toggle('absent', !state.results.some(({answer}) => answer.includes(c)))
  }

  // one question is under way, and the newest one waits
  function ask(fresh = true) {
    if (fresh) state.id++
    state.wanted = {picture: board.pixels(), chosen: state.chosen, id: state.id}
    send()
  }

  function send() {
    if (state.sent || !state.wanted) return
    [state.sent, state.wanted] = [state.wanted, null]
    worker.postMessage(state.sent)
  }

  function heard({data: {result, k, chosen, ms, end, failed: why}}) {
    if (why) return failed(why)
    if (end) {
      state.shown = state.sent
      state.sent = null
      announce()
      if (state.wanted) send()
      else waiting.splice(0).forEach(done => done())
      return
    }
    state.sent.chosen = chosen
    if (state.chosen === null) {
      state.chosen = chosen
      inputs[chosen].checked = true
    }
    state.results[k] = result
    showResult(result, k, ms)
  }

  function say(text) {
    byId('status').className = 'failed'
    byId('status').textContent = text
  }

  function failed(why) {
    say(`The networks cannot run in this browser (${why}). A newer Chromium, Edge, Firefox or Safari can.`)
  }

  async function settled() {
    if (state.sent || state.wanted || !state.results.length) await new Promise(done => waiting.push(done))
    const {picture, chosen} = state.shown
    const networks = state.results.map(({name, answer, whole, map, shape}) =>
      ({name, answer: Array.from(answer), whole, map: Array.from(map), shape}))
    return {size, chosen, pixels: Array.from(picture), networks}
  }

  function choose(c) {
    state.chosen = c
    inputs[c].checked = true
    ask(false)
  }

  async function open(source, described) {  // a file or an image
    try {
      if (source.decode) await source.decode()
      const bitmap = await createImageBitmap(source)
      state.chosen = null  // the largest in it
      board.fill(bitmap)
      byId('picture').ariaLabel = described
    } catch { say('This file is no picture that the browser can read.') }
  }

  // build
  const board = new Board(byId('picture'), byId('cursor'), size, () => ask())
  const tools = [...Object.keys(shapes).filter(name => vocab.includes(name)), 'brush']
  function take(tool) {  // and look for it
    board.tool = tool
    if (vocab.includes(tool)) choose(vocab.indexOf(tool))
  }
  for (const [k, tool] of tools.entries())
    choice('tools', tool, [icon(tool), hidden(tool)], !k, take).parentElement.title = tool
  board.tool = tools[0]
  for (const [k, paint] of paints.entries())
    choice('paints', k, [board.textures[k], hidden(`${paint[0]} ${k + 1}`)], !k, () => { board.paint = k })
  const inputs = vocab.map((name, c) => choice('classes', name, [swatch(colours[c]), name], false, () => choose(c)))
  const panels = camkdNetworks.map(panel)
  byId('networks').style.setProperty('--n', panels.length)
  byId('version').textContent = camkdRuntime.version
  showBar(byId('bar'), ramp)
  for (const {name, source} of examples) {
    const image = made('img', {src: source, alt: name, width: 48, height: 48})
    const button = made('button', {type: 'button'}, image)
    button.addEventListener('click', () => open(image, `The picture that the networks see: ${name}`))
    byId('examples').append(button)
  }

  for (const name of ['radius', 'angle']) byId(name).addEventListener('input', event => {
    board[name] = +event.target.value
    board.show()
  })
  byId('undo').addEventListener('click', () => board.undo())
  byId('clear').addEventListener('click', () => board.clear())
  const openFirst = ({files: [file]}) => file && open(file, 'A photograph of yours')
  byId('photo').addEventListener('change', event => openFirst(event.target))
  document.addEventListener('keydown', event => {
    if ((event.ctrlKey || event.metaKey) && event.key === 'z') { event.preventDefault(); board.undo() }
  })
  document.addEventListener('dragover', event => event.preventDefault())
  document.addEventListener('drop', event => {
    event.preventDefault()
    openFirst(event.dataTransfer)
  })

  // begin
  const text = `${camkdRuntime.script}\n;(${camkdEngine})()`
  const worker = new Worker(URL.createObjectURL(new Blob([text], {type: 'text/javascript'})))
  worker.onmessage = heard
  worker.onerror = event => failed(event.message)
  worker.postMessage({start: {networks: camkdNetworks, runtime: camkdRuntime, size, background}})
  if (examples.length) byId('examples').firstChild.click()
  else board.clear()
  return {settled}
})()
