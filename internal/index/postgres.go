package index

import (
	"context"
	"errors"
	"log/slog"
)

func openPostgres(context.Context, string, *slog.Logger) (*DB, error) {
	return nil, errors.New("soon")
}
