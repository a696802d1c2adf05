// Package streaming holds the registry's own conversion to its promises where
// more than one process does it: two replicas on PostgreSQL and MinIO, killed in
// turns.
package streaming
