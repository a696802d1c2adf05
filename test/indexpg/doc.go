// Package indexpg runs the suite of internal/index on a real PostgreSQL, and
// what only makes sense there: two handles as two replicas have them, and
// connections that break.
package indexpg
