//go:build classic

// Command classic goes with one runner through what Ollama v0.24 does with a classic one, with that version's types.
//
// It writes one JSON object a step, {"step","status","answer"}: the HTTP status and what the types made of the answer,
// or the text of a refusal. Usage: classic ADDRESS
package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"net/http"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/ollama/ollama/api"
	"github.com/ollama/ollama/ml"
)

var address = os.Args[1]

func main() {
	awaitStatus("launched", ServerStatusLaunched)
	if len(os.Args) > 2 && os.Args[2] == "embed" {
		embed()
		return
	}
	get("info", "/info", &[]ml.DeviceInfo{})
	completion("completion before load", CompletionRequest{Prompt: "the fox"})

	request := LoadRequest{Parallel: 2, BatchSize: 512, KvSize: 256, NumThreads: 1, FlashAttention: ml.FlashAttentionAuto}
	for _, operation := range []LoadOperation{LoadOperationFit, LoadOperationAlloc, LoadOperationCommit} {
		request.Operation = operation
		post("load "+operation.name(), "/load", request, &LoadResponse{})
	}
	awaitStatus("ready", ServerStatusReady)
	post("load again", "/load", request, &LoadResponse{})

	completion("completion", CompletionRequest{Prompt: "the fox", Shift: true, Truncate: true})
	completion("completion with logprobs", CompletionRequest{Prompt: `"hi" <b>é` + "\u2028", Logprobs: true, TopLogprobs: 2})
	completion("prompt too long", CompletionRequest{Prompt: strings.Repeat("the fox ", 200)})
	completion("prompt truncated", CompletionRequest{Prompt: strings.Repeat("the fox ", 200), Truncate: true})
	completion("grammar", CompletionRequest{Prompt: "x", Grammar: `root ::= "a"`})
	completion("format", CompletionRequest{Prompt: "x", Format: json.RawMessage(`{"type":"object"}`)})
	completion("schema", CompletionRequest{Prompt: "x", Format: json.RawMessage(`{"enum":["yes"]}`), Grammar: `root ::= "no"`})
	completion("bad schema", CompletionRequest{Prompt: "x", Format: json.RawMessage(`{"type":"foo"}`)})
	completion("no format", CompletionRequest{Prompt: "x", Format: json.RawMessage(`""`)})
	completion("image", CompletionRequest{Prompt: "[img-0]", Images: []ImageData{{Data: []byte("x")}}})
	post("embedding", "/embedding", EmbeddingRequest{Content: "the fox"}, &EmbeddingResponse{})

	request.Operation = LoadOperationClose
	post("load close", "/load", request, &LoadResponse{})
	awaitStatus("launched again", ServerStatusLaunched)
}

// embed goes the way of /api/embed: a goroutine a text, so many at once as the parent allows, each vector normalised
// there; and of /api/embeddings, one text whose vector is passed on as it is.
func embed() {
	request := LoadRequest{Parallel: 1, BatchSize: 512, KvSize: 64, NumThreads: 1, FlashAttention: ml.FlashAttentionAuto}
	for _, operation := range []LoadOperation{LoadOperationFit, LoadOperationAlloc, LoadOperationCommit} {
		request.Operation = operation
		post("load "+operation.name(), "/load", request, &LoadResponse{})
	}
	awaitStatus("ready", ServerStatusReady)

	const texts, atOnce = 64, 4
	answers := make([]EmbeddingResponse, texts)
	var waiting sync.WaitGroup
	room := make(chan struct{}, atOnce)
	for i := range texts {
		waiting.Add(1)
		go func() {
			defer waiting.Done()
			room <- struct{}{}
			defer func() { <-room }()
			text := strings.Repeat("the fox ", 1+i%9) + fmt.Sprint(i)
			answers[i] = embedding(EmbeddingRequest{Content: text})
			answers[i].Embedding = normalize(answers[i].Embedding)
		}()
	}
	waiting.Wait()
	report("api embed", http.StatusOK, answers)
	report("api embeddings", http.StatusOK, embedding(EmbeddingRequest{Content: "the fox"}))

	post("text too long", "/embedding", EmbeddingRequest{Content: strings.Repeat("the fox ", 100)}, &EmbeddingResponse{})
	post("empty text", "/embedding", EmbeddingRequest{}, &EmbeddingResponse{})
	completion("completion", CompletionRequest{Prompt: "the fox"})
	request.Operation = LoadOperationClose
	post("load close", "/load", request, &LoadResponse{})
}

func embedding(request EmbeddingRequest) (answer EmbeddingResponse) {
	data, err := json.Marshal(request)
	must(err)
	response, err := http.Post(address+"/embedding", "application/json", bytes.NewReader(data))
	must(err)
	defer response.Body.Close()
	must(json.NewDecoder(response.Body).Decode(&answer))
	return answer
}

func normalize(vector []float32) []float32 {
	var sum float64
	for _, value := range vector {
		sum += float64(value) * float64(value)
	}
	length := math.Max(math.Sqrt(sum), 1e-12)
	for i := range vector {
		vector[i] = float32(float64(vector[i]) / length)
	}
	return vector
}

func (o LoadOperation) name() string {
	return [...]string{"fit", "alloc", "commit", "close"}[o]
}

func awaitStatus(step string, wanted ServerStatus) {
	var answer ServerStatusResponse
	for range 300 {
		// Before it listens, too, a parent just asks again.
		if response, err := http.Get(address + "/health"); err == nil {
			must(json.NewDecoder(response.Body).Decode(&answer))
			response.Body.Close()
			if answer.Status == wanted {
				report(step, response.StatusCode, answer)
				return
			}
		}
		time.Sleep(100 * time.Millisecond)
	}
	must(fmt.Errorf("%s: the status stays %v", step, answer))
}

func get(step, path string, answer any) {
	response, err := http.Get(address + path)
	must(err)
	read(step, response, answer)
}

func post(step, path string, request, answer any) {
	data, err := json.Marshal(request)
	must(err)
	response, err := http.Post(address+path, "application/json", bytes.NewReader(data))
	must(err)
	read(step, response, answer)
}

func read(step string, response *http.Response, answer any) {
	defer response.Body.Close()
	data, err := io.ReadAll(response.Body)
	must(err)
	if response.StatusCode != http.StatusOK {
		report(step, response.StatusCode, strings.TrimSpace(string(data)))
		return
	}
	must(json.Unmarshal(data, answer))
	report(step, response.StatusCode, answer)
}

func completion(step string, request CompletionRequest) {
	options := api.DefaultOptions()
	options.NumPredict, options.Temperature = 6, 0
	request.Options = &options
	var body bytes.Buffer
	encoder := json.NewEncoder(&body)
	encoder.SetEscapeHTML(false)
	must(encoder.Encode(request))
	response, err := http.Post(address+"/completion", "application/json", &body)
	must(err)
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		read(step, response, nil)
		return
	}
	var answers []CompletionResponse
	for lines := bufio.NewScanner(response.Body); lines.Scan(); {
		var answer CompletionResponse
		must(json.Unmarshal(lines.Bytes(), &answer))
		answers = append(answers, answer)
	}
	report(step, response.StatusCode, answers)
}

func report(step string, status int, answer any) {
	must(json.NewEncoder(os.Stdout).Encode(map[string]any{"step": step, "status": status, "answer": answer}))
}

func must(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "Error:", err)
		os.Exit(1)
	}
}
