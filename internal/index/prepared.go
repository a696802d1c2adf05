package index

import (
	"context"
	"database/sql"
	"errors"
	"sync"
)

// prepared runs statements on SQLite and keeps them prepared: parsing one takes
// longer than running it. The statements of this package are few.
type prepared struct {
	db      *sql.DB
	dialect dialect
	kept    sync.Map // statement as written → *sql.Stmt
}

func (p *prepared) statement(ctx context.Context, text string) (*sql.Stmt, error) {
	if s, ok := p.kept.Load(text); ok {
		return s.(*sql.Stmt), nil
	}
	s, err := p.db.PrepareContext(ctx, p.dialect.spell(text))
	if err != nil {
		return nil, err
	}
	if other, loaded := p.kept.LoadOrStore(text, s); loaded {
		return other.(*sql.Stmt), s.Close()
	}
	return s, nil
}

func (p *prepared) lock(context.Context, string) error { return nil } // there is one writer

func (p *prepared) query(ctx context.Context, text string, args ...any) (*sql.Rows, error) {
	s, err := p.statement(ctx, text)
	if err != nil {
		return nil, err
	}
	return s.QueryContext(ctx, args...)
}

func (p *prepared) exec(ctx context.Context, text string, args ...any) (int64, error) {
	s, err := p.statement(ctx, text)
	if err != nil {
		return 0, err
	}
	r, err := s.ExecContext(ctx, args...)
	if err != nil {
		return 0, err
	}
	return r.RowsAffected()
}

func (p *prepared) close() error {
	var errs []error
	p.kept.Range(func(_, s any) bool {
		errs = append(errs, s.(*sql.Stmt).Close())
		return true
	})
	return errors.Join(append(errs, p.db.Close())...)
}
