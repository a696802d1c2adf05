package main

import (
	"bytes"
	"testing"

	"sluice/internal/node/mount/control"
)

func TestStatusSaysWhatIsWrongWithRegistries(t *testing.T) {
	var out bytes.Buffer
	err := printRegistries(&out, []control.RegistryProblem{
		{Registry: "docker.io", Host: "https://mirror:5000/v2", Error: "connection refused"},
		{Registry: "quay.io", Error: "/etc/hosts.toml, line 3: no\nsense"},
	})
	const want = `
registry docker.io: https://mirror:5000/v2 fails:
  connection refused

registry quay.io: its file is wrong and doesn't count:
  /etc/hosts.toml, line 3: no
  sense
`
	if err != nil || out.String() != want {
		t.Errorf("%v\n%s", err, out.String())
	}
}
