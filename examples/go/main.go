// Runs a workflow of Python functions from Go: `go run . ["some text"]`, while a server is up.
package main

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"log"
	"os"
	"os/signal"

	pb "example.com/lattice/gen/lattice/v1"
	"example.com/lattice/lattice"
)

type inputs = map[string]*pb.Binding

func workflow(text string) *pb.WorkflowSpec {
	return &pb.WorkflowSpec{
		DisplayName: "word statistics",
		Functions: map[string]*pb.Function{
			"words":   lattice.Source("words", "def words(text):\n    return text.split()\n"),
			"lengths": lattice.Source("lengths", "def lengths(words):\n    return [len(word) for word in words]\n"),
			"longest": lattice.Source("longest", "def longest(words):\n    return max(words, key=len)\n"),
			"mean":    lattice.Entrypoint("statistics:mean"),
			"report":  lattice.Source("report", "def report(**found):\n    return {**found, 'mean': round(found['mean'], 2)}\n"),
		},
		Tasks: []*pb.TaskSpec{
			lattice.Task("words", "words", inputs{"text": lattice.Value(text)}),
			lattice.Task("lengths", "lengths", inputs{"words": lattice.Output("words")}),
			lattice.Task("longest", "longest", inputs{"words": lattice.Output("words")}), // beside `lengths`
			lattice.Task("mean", "mean", inputs{"data": lattice.Output("lengths")}),
			lattice.Task("report", "report", inputs{
				"longest": lattice.Output("longest"), "mean": lattice.Output("mean"), "text": lattice.Value(text),
			}),
		},
	}
}

func main() {
	text := "A workflow is a graph of tasks and a run is one execution of it"
	if len(os.Args) > 1 {
		text = os.Args[1]
	}
	target := os.Getenv("LATTICE_TARGET")
	if target == "" {
		target = "127.0.0.1:50051"
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, target, text); err != nil {
		log.Fatal(err)
	}
}

func run(ctx context.Context, target, text string) error {
	client, err := lattice.New(target, lattice.Patience)
	if err != nil {
		return err
	}
	defer client.Close()
	runID := newID()
	if err := client.Execute(ctx, runID, workflow(text), show); err != nil {
		return err
	}
	outputs, err := client.Outputs(ctx, runID)
	if err != nil {
		return err
	}
	var report struct {
		Text    string  `json:"text"`
		Longest string  `json:"longest"`
		Mean    float64 `json:"mean"`
	}
	if err := lattice.Decode(outputs["report"]["result"], &report); err != nil {
		return err
	}
	line, err := json.Marshal(report)
	fmt.Println(string(line))
	return err
}

// show prints an event: its number, its name, its task and what it says.
func show(event *pb.RunEvent) error {
	message := event.ProtoReflect()
	kind := message.WhichOneof(message.Descriptor().Oneofs().ByName("event"))
	var taskID, detail string
	if named, ok := message.Get(kind).Message().Interface().(interface{ GetTaskId() string }); ok {
		taskID = named.GetTaskId()
	}
	switch event := event.Event.(type) {
	case *pb.RunEvent_TaskSucceeded:
		detail = event.TaskSucceeded.Outputs["result"].GetJson()
	case *pb.RunEvent_TaskFailed:
		detail = event.TaskFailed.Failure.GetMessage()
	case *pb.RunEvent_RunFinished:
		detail = event.RunFinished.State.String()
	}
	fmt.Printf("%3d  %-15s %-8s %s\n", event.Sequence, kind.Name(), taskID, detail)
	return nil
}

func newID() string {
	bytes := make([]byte, 16)
	if _, err := rand.Read(bytes); err != nil {
		panic(err)
	}
	return fmt.Sprintf("run-%x", bytes)
}
