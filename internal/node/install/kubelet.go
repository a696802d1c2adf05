package install

import (
	"fmt"
	"os"
	"path"
	"path/filepath"
	"strings"
)

// kubeletText sends kubelet's image service through the daemon.
const kubeletText = `# Made by sluice node install, removed by sluice node uninstall.
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
imageServiceEndpoint: unix://%s
`

// kubeletFiles is kubelet's drop-in, where kubelet reads such.
func (o Options) kubeletFiles() (files []file, notes []string) {
	if !o.Kubelet {
		return nil, nil
	}
	socket := path.Join(o.Sockets, "cri.sock")
	dir := o.KubeletConfigDir
	if dir == "" {
		dir = kubeletConfigDir(filepath.Join(o.Root, "proc"))
	}
	if dir == "" {
		return nil, []string{fmt.Sprintf("kubelet reads no directory of configuration files (--config-dir): add the line \"imageServiceEndpoint: unix://%s\" to its configuration and restart it, or give its directory with --kubelet-config-dir", socket)}
	}
	return []file{{
		path: path.Join(dir, "90-sluice.conf"), content: fmt.Appendf(nil, kubeletText, socket), mode: 0o644,
		why: "kubelet: pass on the credentials of pulls", step: StepKubelet,
	}}, []string{"kubelet can't pull images while sluice node is down"}
}

// kubeletConfigDir returns the --config-dir of the kubelet that runs.
func kubeletConfigDir(proc string) string {
	commands, _ := filepath.Glob(filepath.Join(proc, "[0-9]*", "cmdline")) // the pattern is right
	for _, name := range commands {
		content, err := os.ReadFile(name)
		if err != nil {
			continue // it has ended
		}
		words := strings.Split(strings.TrimRight(string(content), "\x00"), "\x00")
		if path.Base(words[0]) != "kubelet" {
			continue
		}
		for i, w := range words {
			if dir, ok := strings.CutPrefix(w, "--config-dir="); ok {
				return dir
			}
			if w == "--config-dir" && i+1 < len(words) {
				return words[i+1]
			}
		}
	}
	return ""
}
