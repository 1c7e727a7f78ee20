// Command decode reads a runner's answer lines of the mlx or the classic dialect and writes what Ollama's own client makes of them.
package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"os"
)

func main() {
	lines := bufio.NewScanner(os.Stdin) // with the limit of 64 KiB a line that Ollama's client has
	answers := json.NewEncoder(os.Stdout)
	for lines.Scan() {
		var answer CompletionResponse
		err := json.Unmarshal(lines.Bytes(), &answer)
		if err == nil {
			err = answers.Encode(answer)
		}
		if err != nil {
			fail(err)
		}
	}
	if err := lines.Err(); err != nil {
		fail(err)
	}
}

func fail(err error) {
	fmt.Fprintln(os.Stderr, "Error:", err)
	os.Exit(1)
}
