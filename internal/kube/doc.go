// Package kube tells a Kubernetes API server what happens to pods' images on
// this node. It follows the events of the node daemon (package happening) and
// makes of them
//
//   - Events on the pod, from component "sluice": Normal Pulling and Pulled of
//     images that stream, Warning NotStreamed of one that should, with why not and
//     what to do;
//   - the pod's condition UpgradeIfStreamableDisabled: False with reason Streamed
//     while all images of its containers were streamed, or else True with the
//     worst of the reasons. Pods of whose images the daemon tells nothing, since
//     they aren't its affair, are never touched;
//   - the node's label kubernetes.azure.com/artifactstreaming-enabled=true, while
//     the daemon answers and streams.
//
// That is for sluice node. A Feature says what is said in which words: teleportd's
// Events are from component "teleportd", there's no condition, and its label is
// another.
//
// The other way around, the node's label sluice.dev/artifact-streaming=false has
// the daemon stream nothing new. Cluster is what is asked of an API server, Daemon
// what is asked of the daemon, and Reporter does the work. Package apiserver is a
// Cluster, and the only one that knows client-go; kubemem is one in memory;
// kubetest holds them to the same promises.
//
// # Each once
//
// The daemon's memory of its last events is the queue. An event is told, and the
// API server has answered, before the next one is looked at. What fails in passing
// is tried again, with growing pauses, as long as it takes; that an API server is
// away costs nothing but time until the daemon forgets, and what it forgot is told
// as lost. What the API server refuses is told once in the log and left; so is what
// it forbids, unless it forbids everything as it does for a moment after its start.
// A request that fails for two minutes while the API server answers others is left, too: a
// pod whose webhook is broken doesn't keep the others waiting.
//
// An Event object's name follows from the event's place in the stream, counts are
// set rather than increased, and a condition follows from what happened. So
// telling something twice has the same effect as once, and a reporter that is
// killed may begin a little too early. What it remembers (where it was, and of the
// last 512 pods what was told) is in a file if Options.State names one; with it a
// reporter that is restarted knows of containers that were made long ago.
//
// # Few requests
//
// There's a limit of requests a second. What happens again (a container that
// crashes and is made anew) is counted in the Event that tells it, every ten
// seconds at most. A condition is written only if it changes, the label too.
//
// # Rights
//
// The reporter reads no pods and lists nothing. These rules of a ClusterRole are
// all it needs:
//
//   - {apiGroups: [""], resources: [events], verbs: [create, patch]}
//   - {apiGroups: [""], resources: [pods/status], verbs: [patch]}
//   - {apiGroups: [""], resources: [nodes], verbs: [get, watch, patch]}
//
// It has to know whether a container is an init, an ordinary or an ephemeral one,
// which the runtime isn't told, and which condition the pod has. It sees both in
// the answer to a patch of the pod's status that changes nothing. (Static pods have
// another UID on the node than at the API server: they get Events, no condition.)
// Without the right
// to patch pods/status there are no conditions, and Events don't say which
// container they are about; without those to nodes there's no label. get on nodes
// is asked only to find out whether an API server that fails a request answers
// others.
//
// # The label
//
// It stays when the reporter ends, since the next one of a rolling update is about
// to come and finds it right, and while the daemon is away for less than
// Options.Grace, as when it's upgraded. Who removes Sluice from a node takes it
// away (`sluice-reporter unlabel`).
package kube
