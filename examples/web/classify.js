// Classifies pictures with a graph that `hierens export MODEL exits --policy policy.json` wrote.
// The address may name another folder: index.html?model=FOLDER/

const folder = new URLSearchParams(location.search).get('model') ?? 'exits/'
const at = id => document.getElementById(id)
let session, exported

ort.env.wasm.numThreads = 1 // threads need headers that plain static servers do not send
ort.env.wasm.wasmPaths = new URL('node_modules/onnxruntime-web/dist/', location.href).href
ort.env.logLevel = 'error' // it would warn that optional inputs are not constants

// An image as the model's input, (1, channels, height, width): the central square, resized and normalised.
async function preprocess(file) {
  const [, channels, height, width] = exported.input.shape
  const { mean, std, crop_pct } = exported.preprocessing
  const bitmap = await createImageBitmap(file)
  const side = Math.min(bitmap.width / width, bitmap.height / height) * crop_pct
  const [w, h] = [side * width, side * height]
  const canvas = new OffscreenCanvas(width, height)
  const context = canvas.getContext('2d', { willReadFrequently: true })
  context.imageSmoothingQuality = 'high'
  context.fillStyle = 'white'
  context.fillRect(0, 0, width, height)
  context.drawImage(bitmap, (bitmap.width - w) / 2, (bitmap.height - h) / 2, w, h, 0, 0, width, height)
  const { data } = context.getImageData(0, 0, width, height)
  const pixels = new Float32Array(channels * height * width)
  for (let i = 0; i < height * width; i++) {
    const [r, g, b] = data.subarray(4 * i, 4 * i + 3)
    const values = channels == 1 ? [(19595 * r + 38470 * g + 7471 * b + 32768) >> 16] : [r, g, b] // Pillow's grey
    values.forEach((value, c) => { pixels[c * height * width + i] = (value / 255 - mean[c]) / std[c] })
  }
  return new ort.Tensor('float32', pixels, [1, channels, height, width])
}

function softmax(logits) {
  const most = Math.max(...logits)
  const exponentials = logits.map(value => Math.exp(value - most))
  const sum = exponentials.reduce((a, b) => a + b)
  return exponentials.map(value => value / sum)
}

// The most probable class, its probability, the networks and MACs that were used, and the time in milliseconds.
async function classify(file) {
  const inputs = { [exported.input.name]: await preprocess(file) }
  const start = performance.now()
  const outputs = await session.run(inputs)
  const milliseconds = performance.now() - start
  const logits = Array.from(outputs.logits.data)
  const probabilities = softmax(logits)
  const index = probabilities.indexOf(Math.max(...probabilities))
  return {
    name: exported.label_names?.[index] ?? `${index}`,
    probability: probabilities[index],
    networks: Number(outputs.leaves.data[0]),
    macs: Number(outputs.macs.data[0]),
    logits,
    milliseconds,
  }
}

async function show(files) {
  for (const file of files) {
    const row = at('results').insertRow(0)
    const picture = document.createElement('img')
    picture.src = URL.createObjectURL(file)
    picture.alt = file.name
    row.insertCell().append(picture)
    try {
      const found = await classify(file)
      const last = exported.depths.at(-1)
      for (const text of [
        found.name,
        `${(100 * found.probability).toFixed(1)} %`,
        `${found.networks} of ${last.networks}`,
        `${Math.round(100 * (1 - found.macs / last.macs))} %`,
        found.milliseconds.toFixed(1),
      ]) row.insertCell().textContent = text
      row.dataset.logits = JSON.stringify(found.logits)
      row.dataset.networks = found.networks
    } catch (error) {
      const cell = row.insertCell()
      cell.colSpan = 5
      cell.textContent = `${file.name} cannot be classified: ${error.message ?? error}`
    }
  }
}

async function load() {
  const answer = await fetch(`${folder}export.json`)
  if (!answer.ok) throw new Error(`there is no ${folder}export.json: run hierens export MODEL ${folder} --policy FILE`)
  exported = await answer.json()
  session = await ort.InferenceSession.create(`${folder}model.onnx`, { executionProviders: ['wasm'] })
  const shape = [1, ...exported.input.shape.slice(1)]
  const blank = new Float32Array(shape.reduce((a, b) => a * b))
  await session.run({ [exported.input.name]: new ort.Tensor('float32', blank, shape) }) // the first call is slower
  const last = exported.depths.at(-1)
  at('about').textContent =
    `${last.networks} networks from one ${exported.backbone}, ${(last.macs / 1e6).toFixed(1)} million ` +
    'multiply-accumulates together. Every picture uses only as many of them as it needs.'
  at('files').disabled = false
}

at('files').addEventListener('change', event => show([...event.target.files]))
const drop = at('drop')
for (const type of ['dragenter', 'dragover'])
  drop.addEventListener(type, event => { event.preventDefault(); drop.classList.add('over') })
for (const type of ['dragleave', 'drop'])
  drop.addEventListener(type, event => { event.preventDefault(); drop.classList.remove('over') })
drop.addEventListener('drop', event => { if (session) show([...event.dataTransfer.files]) })

load().catch(error => { at('about').textContent = `The model cannot be loaded: ${error.message ?? error}` })
