//go:build classic

package main

import "github.com/ollama/ollama/llm"

// CompletionResponse is what the server decodes a line into.
type CompletionResponse = llm.CompletionResponse
