// Package webhook has images converted when they are pushed to a registry that
// isn't ours: the registry tells of each push by a webhook, and a Receiver
// converts what was pushed.
//
// Parse (parse.go) understands the notifications of distribution, the webhooks
// of Harbor in both of its formats, and those of Azure Container Registry. A
// Receiver (receiver.go) answers a request when what it tells of is in a durable
// queue, and not before; its Run (run.go) takes the queue's jobs one after
// another.
//
// A conversion pushes manifests as well, of which the registry tells as well.
// There is no loop: a streaming artifact can't be converted, so those pushes
// cost a look at a manifest at most.
package webhook
