// Package kube runs Sluice where it's meant to run: in a real Kubernetes of one
// node (bed.Cluster), whose etcd, API server, controller manager, scheduler,
// kubelet and containerd are the real programs. Access control is on, so what
// has too few rights fails here, too.
//
// The tests share one cluster and its registry, which the node knows as
// registry.test:5000 and reaches over a link of 200 Mbit/s and 10 ms; each test
// has a namespace of its own. Images that stream are app:1 (small, its files
// have known sums) and debian:1 (600 MB), plain/debian:1 is the same without an
// artifact. An image that was pulled the ordinary way has its layers on the node,
// and then none streams that has the same: tests that look at whether an image
// streams have one of their own. theStage returns all that; a test that has failed
// prints the pods, the events, and the last words of every program.
//
// A pod with the runtime class "plain" and the annotation plainRuntime is
// pulled and run with overlayfs on the same node, to compare with.
package kube
