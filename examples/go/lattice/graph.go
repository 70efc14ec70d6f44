package lattice

import (
	"encoding/json"
	"fmt"

	pb "example.com/lattice/gen/lattice/v1"
)

// Entrypoint is a function that workers have by name: `package.module:name` of Python, called with its inputs by
// keyword, or a name of a worker in another language.
func Entrypoint(path string) *pb.Function {
	python := &pb.PythonFunction{CallStyle: pb.CallStyle_CALL_STYLE_KEYWORDS}
	return &pb.Function{Entrypoint: path, Python: python}
}

// Source is Python source as a function of a workflow; name is the function to call in it.
func Source(name, code string) *pb.Function {
	source := &pb.PythonFunction_Source{Source: &pb.PythonSource{Name: name, Code: code}}
	return &pb.Function{Python: &pb.PythonFunction{Code: source}}
}

// Value is an input known now. It panics when the value is not JSON.
func Value(value interface{}) *pb.Binding {
	text, err := json.Marshal(value)
	if err != nil {
		panic(fmt.Sprintf("an input is not JSON: %v", err))
	}
	payload := &pb.Payload{Content: &pb.Payload_Json{Json: string(text)}}
	return &pb.Binding{Source: &pb.Binding_Payload{Payload: payload}}
}

// Output is an input that is the output of another task.
func Output(taskID string) *pb.Binding {
	return &pb.Binding{Source: &pb.Binding_Output{Output: &pb.OutputRef{TaskId: taskID, Output: "result"}}}
}

// Task is a task of one output, `result`.
func Task(taskID, function string, inputs map[string]*pb.Binding) *pb.TaskSpec {
	return &pb.TaskSpec{TaskId: taskID, Function: function, Inputs: inputs, Outputs: []string{"result"}}
}

// Decode stores an output in value. Only JSON can be read from every language.
func Decode(payload *pb.Payload, value interface{}) error {
	content, ok := payload.GetContent().(*pb.Payload_Json)
	if !ok {
		return fmt.Errorf("a payload of type %q is not JSON", payload.GetMediaType())
	}
	return json.Unmarshal([]byte(content.Json), value)
}
