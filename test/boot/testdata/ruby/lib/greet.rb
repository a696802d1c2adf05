def greet
  'world'
end
