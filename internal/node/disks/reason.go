package disks

import "sluice/internal/node/mount"

// Meaning says in a few words, for people, why an image isn't teleported.
func Meaning(r mount.Reason) string {
	switch r {
	case mount.NoStreamingArtifact:
		return "the registry has no disks of it"
	case mount.ConversionPending:
		return "the registry is still expanding its layers"
	case mount.AlreadyPresent:
		return "the image was on the node already, pulled the ordinary way"
	case mount.PlatformUnsupported:
		return "the registry has it for another platform"
	case mount.RegistryUnavailable:
		return "the registry or its file server didn't answer, or with a failure of its own"
	case mount.RegistryUnsupported:
		return "the registry knows no Teleport"
	case mount.Unauthorized:
		return "the registry wants credentials that this node lacks"
	case mount.IntegrityFailure:
		return "something isn't what its digest, size or format says"
	case mount.PlaneUnavailable:
		return "kernel or disk can't take the mount"
	case mount.Disabled:
		return "it was switched off for this pull"
	}
	return "the image can't be teleported"
}

// Remedy says, for people, what to do about it.
func Remedy(r mount.Reason) string {
	switch r {
	case mount.NoStreamingArtifact:
		return "have its repository take part: sluice teleport edit-attribute REPOSITORY enable; the message says if there's another cause"
	case mount.ConversionPending:
		return "nothing: what is pulled when it's expanded is mounted; sluice teleport check-expansion IMAGE waits for that"
	case mount.AlreadyPresent:
		return "remove the image from the node, such as by crictl rmi IMAGE, so that it is pulled anew"
	case mount.PlatformUnsupported:
		return "push the image for this machine's platform, too"
	case mount.RegistryUnavailable:
		return "look at the message, at the registry, and at the way to the file server; a pull a minute later asks again"
	case mount.RegistryUnsupported:
		return "use a registry with teleport.enabled"
	case mount.Unauthorized:
		return "give this node credentials that may pull the image, such as by docker login as root"
	case mount.IntegrityFailure:
		return "look at the file server's disk; remove and push the image again, so that it is expanded anew"
	case mount.PlaneUnavailable:
		return "the message says what is missing: a newer kernel, disk space, or permission"
	case mount.Disabled:
		return "if that isn't wanted: the message says who did it"
	}
	return "look at the message"
}

// NotTeleported returns the images whose last pull, of those given, ended with a
// pull the ordinary way, by reference.
func NotTeleported(pulls []mount.Outcome) []mount.NotStreamed {
	return mount.NotStreamedOf(pulls, Meaning, Remedy)
}
