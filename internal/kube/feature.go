package kube

// Feature is what a daemon does for pods' images, and in which words Kubernetes is
// told of it.
type Feature struct {
	// Component is who Events are from.
	Component string

	// Label is the node's label that is "true" while the daemon does it.
	Label string

	// Condition: pods get the condition of type ConditionType.
	Condition bool

	how       string // Pulling image … with HOW
	done      string // Image … was DONE
	notReason string // of an Event that it wasn't
}

// Streaming is sluice node's artifact streaming.
func Streaming() Feature {
	return Feature{
		Component: "sluice", Label: "kubernetes.azure.com/artifactstreaming-enabled", Condition: true,
		how: "artifact streaming", done: "streamed", notReason: "NotStreamed",
	}
}

// Teleport is teleportd's. The label is the one that nodes of Azure's preview had;
// their Events came from teleportd, with texts that were never published.
func Teleport() Feature {
	return Feature{
		Component: "teleportd", Label: "kubernetes.azure.com/enable-acr-teleport-plugin",
		how: "Teleport", done: "teleported", notReason: "NotTeleported",
	}
}
