// Package foreign tests conversion in registries that aren't ours: distribution,
// which has no referrers API, so that the artifacts' index is kept in a tag, and
// olareg, which has one. The programs are the real ones.
package foreign
