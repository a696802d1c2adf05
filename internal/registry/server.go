package registry

import (
	"log"
	"log/slog"
	"net/http"
	"time"
)

// NewServer returns a server for a Handler with limits against clients that
// open connections and don't use them. Requests have no time limit of their
// own: the Handler ends those that stand still.
func NewServer(handler http.Handler, logger *slog.Logger) *http.Server {
	var errorLog *log.Logger
	if logger != nil {
		// TLS handshakes that fail, for the most part.
		errorLog = slog.NewLogLogger(logger.Handler(), slog.LevelWarn)
	}
	return &http.Server{
		Handler:           handler,
		ReadHeaderTimeout: 20 * time.Second,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    64 << 10,
		ErrorLog:          errorLog,
	}
}
