// This module stands in for k8s.io/sample-cli-plugin, which k8s.io/kubernetes
// requires but which isn't published; nothing is built of it.
module k8s.io/sample-cli-plugin

go 1.26.8
