package credentials

import (
	"net"
	"path"
	"strings"
)

// matches reports whether a pattern, as kubelet's matchImages and the keys of
// "auths" are, is for a repository: "*.azurecr.io", "registry.io:8080/path". A
// * stands for a part of one label of the host's name. The path must be the
// beginning of the repository's, and the ports must be the same (Kubernetes'
// documentation, "Configure a kubelet image credential provider").
func matches(pattern string, req Request) bool {
	pattern = strings.TrimPrefix(strings.TrimPrefix(pattern, "https://"), "http://")
	host, prefix, _ := strings.Cut(pattern, "/")
	// Docker's way to write a registry's whole address.
	if rest, ok := strings.CutPrefix(prefix+"/", "v1/"); ok {
		prefix = strings.TrimSuffix(rest, "/")
	} else if rest, ok := strings.CutPrefix(prefix+"/", "v2/"); ok {
		prefix = strings.TrimSuffix(rest, "/")
	}
	return strings.HasPrefix(req.Repository, prefix) && matchesHost(host, req.Host)
}

func matchesHost(pattern, host string) bool {
	pattern, port := splitPort(dockerHub(strings.ToLower(pattern)))
	host, hostPort := splitPort(dockerHub(strings.ToLower(host)))
	globs, labels := strings.Split(pattern, "."), strings.Split(host, ".")
	if port != hostPort || len(globs) != len(labels) {
		return false
	}
	for i, glob := range globs {
		if ok, err := path.Match(glob, labels[i]); err != nil || !ok {
			return false
		}
	}
	return true
}

// dockerHub returns the name in references for those that Docker Hub has.
func dockerHub(host string) string {
	switch host {
	case "index.docker.io", "registry-1.docker.io", "registry.hub.docker.com":
		return "docker.io"
	}
	return host
}

func splitPort(hostport string) (host, port string) {
	host, port, err := net.SplitHostPort(hostport)
	if err != nil {
		return hostport, ""
	}
	return host, port
}
