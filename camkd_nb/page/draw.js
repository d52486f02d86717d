// Answers and maps over the grey picture, as the figures of camkd_nb draw them.
'use strict'

function greyed(pixels, i) {  // paler, 0 to 255
  return 255 * .3 + .7 * (.299 * pixels[4 * i] + .587 * pixels[4 * i + 1] + .114 * pixels[4 * i + 2])
}

// bilinear, as in PyTorch with align_corners=False
function enlarged(map, [height, width], side) {
  const taps = n => Array.from({length: side}, (_, i) => {
    const at = Math.max(0, (i + .5) * n / side - .5), low = Math.min(n - 1, Math.floor(at))
    return [low, Math.min(n - 1, low + 1), at - low]
  })
  const rows = taps(height), columns = taps(width), large = new Float32Array(side * side)
  rows.forEach(([a, b, p], y) => columns.forEach(([c, d, q], x) => {
    const upper = (1 - q) * map[a * width + c] + q * map[a * width + d]
    large[y * side + x] = (1 - p) * upper + p * ((1 - q) * map[b * width + c] + q * map[b * width + d])
  }))
  return large
}

const most = map => map.reduce((largest, value) => Math.max(largest, Math.abs(value)), 1e-38)

function signed(share, grey, ramp) {  // the colour of one place of a map, -1 to 1
  const amount = .85 * Math.sqrt(Math.abs(share)), colour = ramp[Math.round(128 + 128 * share)]
  return [0, 1, 2].map(c => (1 - amount) * grey + amount * colour[c])
}

function show(canvas, side, colourOf, edge) {
  const small = show.small ||= document.createElement('canvas'), image = new ImageData(side, side)
  small.width = small.height = side
  for (let i = 0; i < side * side; i++) {
    const colour = colourOf(i)
    for (let c = 0; c < 3; c++) image.data[4 * i + c] = colour[c]
    image.data[4 * i + 3] = 255
  }
  small.getContext('2d').putImageData(image, 0, 0)
  const context = canvas.getContext('2d')
  canvas.width = canvas.height = Math.max(2, Math.round(384 / side)) * side
  context.drawImage(small, 0, 0, canvas.width, canvas.height)
  if (edge) contour(context, edge, side, canvas.width / side)
}

function contour(context, inside, side, scale) {  // white in black, between pixels
  const path = new Path2D(), at = (x, y) => x < side && y < side && inside(y * side + x)
  for (let y = 0; y < side; y++) for (let x = 0; x < side; x++) {
    const here = inside(y * side + x)
    if (x + 1 < side && here !== at(x + 1, y)) line(path, [x + 1, y], [x + 1, y + 1], scale)
    if (y + 1 < side && here !== at(x, y + 1)) line(path, [x, y + 1], [x + 1, y + 1], scale)
  }
  for (const [width, colour] of [[3.5, 'rgba(0,0,0,.8)'], [1.5, '#fff']]) {
    Object.assign(context, {lineWidth: width, strokeStyle: colour, lineCap: 'round'})
    context.stroke(path)
  }
}

function line(path, from, to, scale) {
  path.moveTo(scale * from[0], scale * from[1])
  path.lineTo(scale * to[0], scale * to[1])
}

function showAnswer(canvas, pixels, answer, {size, colours, background}) {
  show(canvas, size, i => {
    const grey = greyed(pixels, i), amount = answer[i] === background ? 0 : .7
    return colours[answer[i]].map(value => (1 - amount) * grey + amount * value)
  })
}

function showMap(canvas, pixels, {map, shape, answer, whole}, chosen, {size, ramp}) {
  const large = enlarged(map, shape, size), scale = most(map)
  show(canvas, size, i => signed(large[i] / scale, greyed(pixels, i), ramp), whole ? null : i => answer[i] === chosen)
}

function showBar(canvas, ramp) {
  const context = canvas.getContext('2d'), image = context.createImageData(257, 1)
  for (let i = 0; i < 257; i++) image.data.set([...signed((i - 128) / 128, 255 * .65, ramp), 255], 4 * i)
  context.putImageData(image, 0, 0)
}
