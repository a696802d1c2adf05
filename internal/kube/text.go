package kube

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"sluice/internal/node/happening"
)

// Reasons of Events, and of a condition that is False.
const (
	reasonPulling  = "Pulling"
	reasonPulled   = "Pulled"
	reasonStreamed = "Streamed"
)

// eventReason returns the reason of the Event that tells of e, "" if none does.
func (f Feature) eventReason(e happening.Event) string {
	switch {
	case e.Kind == happening.Pulling && e.Streamed:
		return reasonPulling
	case e.Kind == happening.Started && e.Streamed:
		return reasonPulled
	case e.Kind == happening.Started:
		return f.notReason
	}
	return ""
}

// eventMessage returns the message of the Event that tells of e.
func (f Feature) eventMessage(e happening.Event) string {
	image := `"` + e.Image + `"`
	here := ""
	if e.BytesTotal > 0 {
		here = fmt.Sprintf(": %d of %d bytes", e.BytesHere, e.BytesTotal)
	}
	switch {
	case e.Kind == happening.Pulling:
		return clip("Pulling image "+image+" with "+f.how, MaxMessage)
	case !e.Streamed:
		return whyNot("Image "+image+" was not "+f.done, e.Reason, e.Message, e.Remedy)
	case e.Present || e.Duration <= 0:
		return clip("Image "+image+" is on this node already ("+f.done+")", MaxMessage-len(here)) + here
	}
	here = fmt.Sprintf(" in %v%s", e.Duration.Round(time.Millisecond), here)
	return clip("Successfully pulled image "+image+" ("+f.done+")", MaxMessage-len(here)) + here
}

// whyNot returns a sentence of at most MaxMessage bytes: "WHAT: REASON: MESSAGE.
// REMEDY". What is too long in it is the message first.
func whyNot(what, reason, message, remedy string) string {
	head := clip(what, MaxMessage/4) + ": " + clip(reason, MaxMessage/8)
	if message = sentence(message); message != "" {
		head += ": "
	}
	tail := "."
	if remedy = sentence(remedy); remedy != "" {
		r, n := utf8.DecodeRuneInString(remedy)
		tail = ". " + string(unicode.ToUpper(r)) + clip(remedy[n:], MaxMessage/4)
	}
	return head + clip(message, MaxMessage-len(head)-len(tail)) + tail
}

// sentence returns s on one line, without the point at its end.
func sentence(s string) string {
	return strings.TrimRight(strings.Join(strings.Fields(strings.ToValidUTF8(s, "?")), " "), ".")
}

// clip cuts s to n bytes.
func clip(s string, n int) string {
	if len(s) <= n {
		return s
	}
	const more = "…"
	n = max(n-len(more), 0)
	for n > 0 && !utf8.RuneStart(s[n]) {
		n--
	}
	return s[:n] + more
}

// eventName returns the name of the Event object that tells of e: always the
// same, so that it's made only once however often it's tried.
func eventName(e happening.Event) string {
	sum := sha256.Sum256([]byte(e.Cursor().String()))
	// A name has at most 253 bytes; a pod's is a DNS name, of which a part that
	// ends with a letter or digit is one.
	pod := e.Pod.Name
	if len(pod) > 230 {
		pod = strings.TrimRight(pod[:230], ".-")
	}
	return pod + "." + hex.EncodeToString(sum[:8])
}

// severity orders the reasons why an image isn't streamed, the worst first: what
// somebody must look at before what is only missing, and that before what was
// asked for. Reasons of a newer daemon come after the first.
var severity = []string{
	"IntegrityFailure", "", "Unauthorized", "PlaneUnavailable", "RegistryUnavailable", "RegistryUnsupported",
	"PlatformUnsupported", "NoStreamingArtifact", "ConversionPending", "AlreadyPresent", "Disabled",
}

func rank(reason string) int {
	if i := slices.Index(severity, reason); i >= 0 {
		return i
	}
	return slices.Index(severity, "")
}

// verdict is how the image of a container came, the last time it was made.
type verdict struct {
	Image   string `json:"image"`
	Reason  string `json:"reason,omitempty"` // why it wasn't streamed; "": it was
	Message string `json:"message,omitempty"`
	Remedy  string `json:"remedy,omitempty"`
}

// judge returns the condition of a pod whose containers have these verdicts. It
// doesn't depend on their order, nor on anything that changes while nothing happens.
func judge(containers map[string]verdict) Condition {
	var bad []string
	for name, v := range containers {
		if v.Reason != "" {
			bad = append(bad, name)
		}
	}
	if len(bad) == 0 {
		return Condition{Status: "False", Reason: reasonStreamed, Message: "Every image of this pod that was to be streamed was streamed."}
	}
	slices.SortFunc(bad, func(a, b string) int {
		if d := rank(containers[a].Reason) - rank(containers[b].Reason); d != 0 {
			return d
		}
		return strings.Compare(a, b)
	})
	worst := containers[bad[0]]
	text := whyNot(fmt.Sprintf(`Image "%s" of container %s was not streamed`, worst.Image, bad[0]), worst.Reason, worst.Message, worst.Remedy)
	if more := bad[1:]; len(more) > 0 {
		text += clip(" Nor were those of "+strings.Join(more, ", ")+".", MaxMessage/2)
	}
	return Condition{Status: "True", Reason: worst.Reason, Message: text}
}
