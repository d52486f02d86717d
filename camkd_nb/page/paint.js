// The picture: textures, shapes, and a board to paint on with a pointer or with keys.
'use strict'

const paints = [  // two colours and how they mix
  ['stripes', '#e4572e', '#f6c28b'], ['checks', '#17487a', '#7fb4de'], ['slope', '#f2c230', '#fff3b8'],
  ['stripes', '#1d6b45', '#9fd6a5'], ['clouds', '#7a3b9a', '#d9b3ea'], ['checks', '#2b2b2b', '#8a8a8a'],
  ['slope', '#e9ecef', '#a9b4bd'], ['clouds', '#8a5a2b', '#d8b184']]

const rgb = colour => [1, 3, 5].map(at => parseInt(colour.slice(at, at + 2), 16))
const mixed = (a, b, share) => a.map((value, c) => value + share * (b[c] - value))

function clouds(side) {  // smooth random values
  const cells = 9, grid = Array.from({length: cells * cells}, Math.random)
  return (x, y) => {
    const [u, v] = [x / side * (cells - 1), y / side * (cells - 1)], [i, j] = [Math.floor(u), Math.floor(v)]
    const [p, q] = [u - i, v - j], at = (a, b) => grid[Math.min(b, cells - 1) * cells + Math.min(a, cells - 1)]
    return (1 - q) * ((1 - p) * at(i, j) + p * at(i + 1, j)) + q * ((1 - p) * at(i, j + 1) + p * at(i + 1, j + 1))
  }
}

function pattern(kind, side) {  // (x, y) -> 0 to 1
  if (kind === 'clouds') return clouds(side)
  const turn = Math.random() * Math.PI, [c, s] = [Math.cos(turn), Math.sin(turn)]
  const often = 2 * Math.PI * (7 + 5 * Math.random()) / side
  const along = (x, y) => x * c + y * s, across = (x, y) => y * c - x * s
  if (kind === 'slope') return (x, y) => Math.min(1, Math.max(0, .5 + (along(x - side / 2, y - side / 2)) / side))
  if (kind === 'stripes') return (x, y) => .5 + .5 * Math.sin(often * along(x, y))
  return (x, y) => .5 + .5 * Math.sin(often * along(x, y)) * Math.sin(often * across(x, y))
}

const noise = () => 18 * (Math.random() + Math.random() + Math.random() - 1.5)  // about 3 % of 255

function texture([kind, first, second], side) {  // a canvas full of paint
  const canvas = Object.assign(document.createElement('canvas'), {width: side, height: side})
  const context = canvas.getContext('2d'), image = context.createImageData(side, side)
  const share = pattern(kind, side), [a, b] = [rgb(first), rgb(second)]
  for (let i = 0; i < side * side; i++) {
    const colour = mixed(a, b, share(i % side, Math.floor(i / side)))
    for (let k = 0; k < 3; k++) image.data[4 * i + k] = colour[k] + noise()
    image.data[4 * i + 3] = 255
  }
  context.putImageData(image, 0, 0)
  return canvas
}

// The shapes of the built-in data set: corners around (0, 0), then those of a hole.
const regular = (corners, radius = 1) => Array.from({length: corners}, (_, k) => {
  const turn = 2 * Math.PI * k / corners, r = Array.isArray(radius) ? radius[k % 2] : radius
  return [r * Math.cos(turn), r * Math.sin(turn)]
})
const quarters = corners => [0, 1, 2, 3].flatMap(turns => corners.map(([x, y]) => {
  for (let k = 0; k < turns; k++) [x, y] = [-y, x]
  return [x, y]
}))
const shapes = {
  disk: [regular(48)], square: [regular(4)], triangle: [regular(3, 1.1)], star: [regular(10, [1.1, .495])],
  ring: [regular(48), regular(48, .55)], cross: [quarters([[1, -.34], [1, .34], [.34, .34]])]}

function outline(tool, {x, y, radius, angle}) {  // a path to fill by the even-odd rule
  const path = new Path2D(), turn = angle * Math.PI / 180, [c, s] = [Math.cos(turn), Math.sin(turn)]
  for (const corners of shapes[tool] || [regular(48, .4)]) {
    corners.forEach(([u, v], k) =>
      path[k ? 'lineTo' : 'moveTo'](x + radius * (u * c - v * s), y + radius * (u * s + v * c)))
    path.closePath()
  }
  return path
}

class Board {  // `changed(settled)` is called after every change of the picture
  constructor(picture, cursor, side, changed) {
    Object.assign(this, {picture, cursor, side, changed, past: [], held: null, tool: 'brush', paint: 0})
    Object.assign(this, {radius: 22, angle: 20, x: side / 2, y: side / 2})
    picture.width = picture.height = side
    cursor.width = cursor.height = 4 * side
    this.context = picture.getContext('2d', {willReadFrequently: true})
    this.textures = paints.map(paint => texture(paint, side))
    this.listen()
  }

  pixels() { return this.context.getImageData(0, 0, this.side, this.side).data }
  size() { return this.radius / 100 * this.side }

  keep() {
    this.past.push(this.context.getImageData(0, 0, this.side, this.side))
    if (this.past.length > 40) this.past.shift()
  }

  undo() {
    if (!this.past.length) return
    this.context.putImageData(this.past.pop(), 0, 0)
    this.changed(true)
  }

  fill(source) {  // a canvas or bitmap, cut to the largest square in its middle
    this.keep()
    const {width, height} = source, cut = Math.min(width, height), [left, top] = [(width - cut) / 2, (height - cut) / 2]
    this.context.imageSmoothingQuality = 'high'
    this.context.drawImage(source, left, top, cut, cut, 0, 0, this.side, this.side)
    this.changed(true)
  }

  clear() {
    const byte = () => Math.floor(60 + 160 * Math.random()).toString(16).padStart(2, '0')
    const any = () => `#${byte()}${byte()}${byte()}`, kinds = ['stripes', 'checks', 'clouds', 'slope']
    this.fill(texture([kinds[Math.floor(4 * Math.random())], any(), any()], this.side))
  }

  put() {  // the tool's paint at its place
    this.context.fillStyle = this.context.createPattern(this.textures[this.paint], 'repeat')
    this.context.fill(outline(this.tool, {...this, radius: this.size()}), 'evenodd')
  }

  press() {
    this.keep()
    this.held = this.past[this.past.length - 1]
    this.put()
    this.changed(false)
  }

  drag(x, y) {  // a brush leaves a trace, a shape moves
    const [a, b] = [this.x, this.y], steps = this.tool === 'brush' ? Math.ceil(Math.hypot(x - a, y - b) / 2) || 1 : 1
    if (this.tool !== 'brush') this.context.putImageData(this.held, 0, 0)
    for (let k = 1; k <= steps; k++) {
      Object.assign(this, {x: a + (x - a) * k / steps, y: b + (y - b) * k / steps})
      this.put()
    }
    this.changed(false)
  }

  drop() {
    this.held = null
    this.changed(true)
  }

  show(visible = true) {  // the outline of the tool
    const context = this.cursor.getContext('2d')
    context.setTransform(1, 0, 0, 1, 0, 0)
    context.clearRect(0, 0, this.cursor.width, this.cursor.height)
    if (!visible) return
    const path = outline(this.tool, {x: 4 * this.x, y: 4 * this.y, radius: 4 * this.size(), angle: this.angle})
    for (const [width, colour] of [[5, 'rgba(0,0,0,.65)'], [2, '#fff']]) {
      Object.assign(context, {lineWidth: width, strokeStyle: colour})
      context.stroke(path)
    }
  }

  place(event) {
    const box = this.cursor.getBoundingClientRect()
    const shares = [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height]
    return shares.map(share => share * this.side)
  }

  listen() {
    const on = (name, does) => this.cursor.addEventListener(name, does)
    on('pointerdown', event => {
      if (event.button) return
      this.cursor.setPointerCapture(event.pointerId);
      [this.x, this.y] = this.place(event)
      this.press()
      this.show()
    })
    on('pointermove', event => {
      if (this.held) this.drag(...this.place(event))
      else [this.x, this.y] = this.place(event)
      this.show()
    })
    for (const name of ['pointerup', 'pointercancel']) on(name, () => this.held && this.drop())
    on('pointerleave', () => this.held || this.show(document.activeElement === this.cursor))
    on('focus', () => this.show())
    on('blur', () => this.show(false))
    on('keydown', event => this.key(event))
  }

  key(event) {
    const far = event.shiftKey ? 8 : 2
    const moves = {ArrowLeft: [-far, 0], ArrowRight: [far, 0], ArrowUp: [0, -far], ArrowDown: [0, far]}
    if (moves[event.key]) {
      const inside = value => Math.min(this.side, Math.max(0, value));
      [this.x, this.y] = [inside(this.x + moves[event.key][0]), inside(this.y + moves[event.key][1])]
    } else if (event.key === ' ' || event.key === 'Enter') { this.press(); this.drop() }
    else return
    event.preventDefault()
    this.show()
  }
}
