// Against a real server at LATTICE_TARGET, through a proxy that breaks connections.

package lattice

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	pb "example.com/lattice/gen/lattice/v1"
)

// Of tests whose server is up.
const patience = 3 * time.Second

const nap = "import time\n\ndef nap(seconds):\n    time.sleep(seconds)\n    return seconds\n"

// naps is a chain of tasks that sleep.
func naps(count int, seconds float64) *pb.WorkflowSpec {
	spec := &pb.WorkflowSpec{Functions: map[string]*pb.Function{"nap": Source("nap", nap)}}
	for i := 0; i < count; i++ {
		task := Task(fmt.Sprintf("nap-%d", i), "nap", map[string]*pb.Binding{"seconds": Value(seconds)})
		if i > 0 {
			task.After = []string{fmt.Sprintf("nap-%d", i-1)}
		}
		spec.Tasks = append(spec.Tasks, task)
	}
	return spec
}

func target() string {
	if found := os.Getenv("LATTICE_TARGET"); found != "" {
		return found
	}
	return "127.0.0.1:50051"
}

func newClient(t *testing.T, target string, patience time.Duration) *Client {
	t.Helper()
	client, err := New(target, patience)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	return client
}

func runID(t *testing.T) string {
	return fmt.Sprintf("%s-%d", t.Name(), time.Now().UnixNano())
}

// proxy carries bytes to the server; cut breaks every connection, and new ones work until it is closed.
type proxy struct {
	net.Listener
	mutex       sync.Mutex
	open        map[net.Conn]bool
	connections int
}

func newProxy(t *testing.T, target string) *proxy {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	made := &proxy{Listener: listener, open: map[net.Conn]bool{}}
	go made.serve(target)
	t.Cleanup(func() {
		made.Close()
		made.cut()
	})
	return made
}

func (p *proxy) serve(target string) {
	for {
		near, err := p.Accept()
		if err != nil {
			return
		}
		far, err := net.Dial("tcp", target)
		if err != nil {
			near.Close()
			continue
		}
		p.mutex.Lock()
		p.open[near], p.open[far] = true, true
		p.connections++
		p.mutex.Unlock()
		for _, pair := range [][2]net.Conn{{near, far}, {far, near}} {
			go func(from, to net.Conn) {
				io.Copy(to, from)
				from.Close()
				to.Close()
			}(pair[0], pair[1])
		}
	}
}

func (p *proxy) cut() {
	p.mutex.Lock()
	defer p.mutex.Unlock()
	for connection := range p.open {
		connection.Close()
		delete(p.open, connection)
	}
}

func TestStreamThatBreaksGoesOnAfterTheLastEvent(t *testing.T) {
	between := newProxy(t, target())
	client := newClient(t, between.Addr().String(), patience)
	var seen []int64
	err := client.Execute(context.Background(), runID(t), naps(5, 0.2), func(event *pb.RunEvent) error {
		seen = append(seen, event.Sequence)
		if event.GetTaskSucceeded() != nil {
			between.cut()
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if fmt.Sprint(seen) != "[1 2 3 4 5 6 7 8 9 10 11 12]" {
		t.Errorf("saw the events %v", seen)
	}
	if between.connections < 3 {
		t.Errorf("dialled %d times", between.connections)
	}
}

func TestReaderMayLeaveAndTheRunGoesOn(t *testing.T) {
	client, id, left := newClient(t, target(), patience), runID(t), errors.New("left")
	err := client.Execute(context.Background(), id, naps(2, 0.2), func(event *pb.RunEvent) error {
		if event.GetTaskStarted() != nil {
			return left
		}
		return nil
	})
	if err != left {
		t.Fatalf("ended with %v", err)
	}
	outputs, err := client.Outputs(context.Background(), id)
	if err != nil {
		t.Fatal(err)
	}
	var seconds float64
	if err := Decode(outputs["nap-1"]["result"], &seconds); err != nil || seconds != 0.2 || len(outputs) != 1 {
		t.Errorf("got %v and %v", outputs, err)
	}
}

func TestTaskThatFailsIsAnErrorOfTheRunWithItsMessage(t *testing.T) {
	client, id := newClient(t, target(), patience), runID(t)
	spec := &pb.WorkflowSpec{
		Functions: map[string]*pb.Function{"fail": Source("fail", "def fail():\n    raise ValueError('no such word')\n")},
		Tasks:     []*pb.TaskSpec{Task("fail", "fail", nil)},
	}
	if err := client.Execute(context.Background(), id, spec, func(*pb.RunEvent) error { return nil }); err != nil {
		t.Fatal(err)
	}
	_, err := client.Outputs(context.Background(), id)
	if err == nil || !strings.Contains(err.Error(), "RUN_STATE_FAILED") || !strings.Contains(err.Error(), "no such word") {
		t.Errorf("got the error %v", err)
	}
}

func TestCallsEndWhenThereIsNoServer(t *testing.T) {
	between := newProxy(t, target())
	client, id := newClient(t, between.Addr().String(), time.Second), runID(t)
	err := client.Execute(context.Background(), id, naps(1, 30), func(event *pb.RunEvent) error {
		if event.GetTaskStarted() != nil {
			between.Close()
			between.cut()
		}
		return nil
	})
	if err == nil || !strings.Contains(err.Error(), "nothing was heard of the server for 1s") {
		t.Errorf("got the error %v", err)
	}
	if _, err := client.Outputs(context.Background(), id); err == nil {
		t.Error("got outputs from a server that is not there")
	}
	ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
	defer cancel()
	if _, err := newClient(t, between.Addr().String(), Patience).Outputs(ctx, id); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got the error %v", err)
	}
}

func TestServerBeyondThisMachineNeedsTLSAndToken(t *testing.T) {
	t.Setenv("LATTICE_TOKEN", "")
	if _, err := New("192.0.2.1:50051", Patience); err == nil || !strings.Contains(err.Error(), "LATTICE_TOKEN") {
		t.Errorf("got the error %v", err)
	}
	if _, err := New("nowhere", Patience); err == nil || !strings.Contains(err.Error(), "HOST:PORT") {
		t.Errorf("got the error %v", err)
	}
}
