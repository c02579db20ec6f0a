// Logits of a GGUF file in llama.cpp, for check_llama_cpp.py.
//
//     node llama_cpp_logits.mjs FOLDER requests.json replies.json
//
// FOLDER holds node_modules/node-llama-cpp, whose packages bring llama.cpp ready built. A request is one file:
// {model, threads, texts: [...], inputs: [{tokens: [...], scored: n}, ...]}; its reply has the ids of each text and, for
// each input, the logits after each of its last n tokens, by token id. Weights and cache are float32, no flash attention.
import {readFileSync, writeFileSync} from "node:fs";
import {join} from "node:path";
import {pathToFileURL} from "node:url";

const [folder, requests, answers] = process.argv.slice(2);
const {getLlama, LlamaLogLevel} = await import(
    pathToFileURL(join(folder, "node_modules", "node-llama-cpp", "dist", "index.js")).href
);
const llama = await getLlama({gpu: false, build: "never", skipDownload: true, logLevel: LlamaLogLevel.error});

async function answer({model: modelPath, threads, texts, inputs}) {
    const model = await llama.loadModel({modelPath, useMmap: true});
    const longest = Math.max(...inputs.map(({tokens}) => tokens.length));
    const context = await model.createContext({
        contextSize: longest + 8, batchSize: 512, threads, flashAttention: false, sequences: 1,
        experimentalKvCacheKeyType: "F32", experimentalKvCacheValueType: "F32", ignoreMemorySafetyChecks: true
    });
    const sequence = context.getSequence();
    const logits = [];
    for (const {tokens, scored} of inputs) {
        await sequence.clearHistory();
        const first = tokens.length - scored;
        const items = tokens.map((token, index) => index < first ? token : [token, {generateNext: {logits: true}}]);
        const results = await sequence.controlledEvaluate(items);
        logits.push(results.slice(first).map(({next}) => {
            const row = new Array(next.logits.size);
            for (const [token, value] of next.logits) row[token] = value;
            return row;
        }));
    }
    const ids = texts.map((text) => [...model.tokenize(text, false)]);
    await context.dispose();
    await model.dispose();
    return {ids, logits};
}

const replies = [];
for (const request of JSON.parse(readFileSync(requests, "utf8"))) replies.push(await answer(request));
writeFileSync(answers, JSON.stringify({release: llama.llamaCppRelease, replies}));
process.exit(0);
