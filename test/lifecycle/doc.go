// Package lifecycle puts a node through what happens to nodes: every version of
// containerd that is supported, by both of the CRI's ways to pull; starts in any
// order, restarts and reboots; pods with user namespaces; images that are
// removed; and the end, after which containerd is plain containerd.
package lifecycle
