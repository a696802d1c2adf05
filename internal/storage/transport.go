package storage

import (
	"net"
	"net/http"
	"time"
)

// NewTransport returns what a Bucket's requests go over: it gives up on a
// service that doesn't answer, not on a long answer.
func NewTransport() *http.Transport {
	return &http.Transport{
		Proxy:                 http.ProxyFromEnvironment,
		DialContext:           (&net.Dialer{Timeout: 10 * time.Second, KeepAlive: 15 * time.Second}).DialContext,
		TLSHandshakeTimeout:   10 * time.Second,
		ResponseHeaderTimeout: time.Minute,
		ExpectContinueTimeout: 10 * time.Second,
		IdleConnTimeout:       time.Minute,
		MaxIdleConnsPerHost:   64,
		DisableCompression:    true, // what is stored is what is wanted
		ForceAttemptHTTP2:     true,
	}
}
