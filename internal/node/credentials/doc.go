// Package credentials knows how this node proves to registries who it is, for as
// long as a mount lives: containers read long after the pull that started them,
// when what kubelet passed for it may have expired.
//
// A Chain asks its Sources in turn, for a registry and a repository, and uses
// the first credential that the registry accepts. On a node they are, in this
// order:
//
//	Passed       what came with the pull by CRI (package cri listens in)
//	Plugins      kubelet's credential-provider plugins
//	Docker       docker's configuration and credential helpers
//	PullSecrets  Kubernetes pull secrets, as files
//	Azure        the machine's managed identity, or a service principal
//
// # Refused, expired, revoked
//
// A registry's client (package remote) asks for another credential when one was
// refused; the Chain then notes the refusal, and goes on with the next one: of
// the same source, if that has a newer or a second one, or of the next source.
// A refused credential is tried again after a minute, so that what was mended at
// the registry works, and by each request if there's no other. When all are
// refused, the request is tried without any, and when that is refused too the
// error says what became of each source.
// Chain.Status tells the same, and the log once per change. None of them ever
// shows a secret.
//
// # Time
//
// A source that has to ask somebody (a plugin, a helper, a metadata service)
// asks once for all who want the same, in the background: those who wait do so
// for five seconds and then go on with the next source. What it got is kept
// until it expires, and renewed ahead of that as long as it is in use, so that
// no read waits for it. A failure is not repeated at once. So one source that
// hangs delays its own registries, by a bounded time, and no others.
//
// # What is stored
//
// Only what CRI passed, because nobody could be asked for it again: in a file of
// mode 0600 on a file system in memory.
package credentials
