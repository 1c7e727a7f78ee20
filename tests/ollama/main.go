// Command ollama is Ollama's own command line whose models are run by ollama-mlx-runner.
//
// Ollama starts a model by running its own executable with the word "runner". Here that word becomes
// ollama-mlx-runner, in the same process: the parent's pid, pipes and signals reach it as they would Ollama's own.
package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	_ "unsafe" // for go:linkname

	"github.com/spf13/cobra"

	"github.com/ollama/ollama/cmd"
)

const (
	runnerName     = "ollama-mlx-runner"
	runnerVariable = "OLLAMA_MLX_RUNNER"
)

// loadedMLX is where Ollama from v0.34 on notes the MLX library that it has loaded into itself. It refuses safetensors
// models without one, though only its child needs it and ours brings its own. (Where Ollama has none, its own
// `ollama create --quantize` cannot work, and will say so less clearly than before.)
//
//go:linkname loadedMLX github.com/ollama/ollama/mlx.initLoadedPath
var loadedMLX string

func main() {
	path, err := findRunner()
	command := strings.Join(os.Args[1:min(2, len(os.Args))], "")
	if command == "runner" && err == nil {
		err = syscall.Exec(path, append([]string{path}, os.Args[1:]...), os.Environ())
	}
	if err != nil && slices.Contains([]string{"runner", "serve", "start"}, command) {
		// Of a child, the parent shows its user the last line that begins so. To v0.24 it waits for ever for a child that
		// ends before it listens, so a server that has none does not start.
		fmt.Fprintln(os.Stderr, "Error:", err)
		os.Exit(1)
	}
	if loadedMLX == "" && err == nil {
		loadedMLX = path
	}
	cobra.CheckErr(cmd.NewCLI().ExecuteContext(context.Background()))
}

func findRunner() (string, error) {
	wanted := os.Getenv(runnerVariable)
	if wanted == "" {
		wanted = runnerName
	}
	path, err := exec.LookPath(wanted)
	if err != nil {
		return "", fmt.Errorf("%w; install %s, or name it in %s", err, runnerName, runnerVariable)
	}
	return path, nil
}
