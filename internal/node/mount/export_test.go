package mount

// SetWholeTable sets up to what size a chunk table is fetched whole before the
// first mount.
func (o *Options) SetWholeTable(n int64) { o.wholeTable = n }

// ForgetTables is what a Manager does every so often.
func (m *Manager) ForgetTables() { m.forgetTables() }
