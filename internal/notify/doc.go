// Package notify tells other systems what happened in the registry: it
// delivers webhooks.
//
// Whoever changes the registry enqueues an Event into the index's queue
// Queue, in the transaction of the change, so that there is an event if and
// only if there is a change. A Notifier fans each one out into a queue per
// endpoint and delivers it from there by POST, so that an endpoint that is
// down holds up none but itself.
//
// # What an endpoint gets
//
// The body is an envelope of one event as distribution's notifications have it
// (https://distribution.github.io/distribution/about/notifications/), of media
// type MediaType: its consumers understand it. Any answer of 2xx acknowledges
// it; after anything else, and after a time-out, it is sent again, later and
// later, until Options.Retain has passed. So each event arrives at least once: its id
// tells repetitions. Events of one repository arrive in the order in which they
// happened, unless one can't be delivered for a minute: then those after it go
// ahead.
//
// # Signatures
//
// An endpoint with a secret gets the header
//
//	Sluice-Signature: t=1764003600,v1=5257a8…
//
// t is when it was sent, in seconds since 1970; v1 the HMAC-SHA256, in
// hexadecimal digits and keyed by the secret, of t's digits, a full stop and
// the body as it arrived. To verify it: compute it and compare in constant
// time, and refuse what was sent more than some minutes ago, or a recorded
// request could be played again. Verify does that in Go; in a shell:
//
//	printf '%s.%s' "$t" "$body" | openssl dgst -sha256 -hmac "$secret"
package notify
