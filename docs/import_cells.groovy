// QuPath 0.4 or newer: Automate > Script editor, then Run > Run for project.
// Puts the cells of a folder of `segpc export --to geojson` onto the pictures of a project.
// A picture called smear.tif gets smear.geojson; cells that came from this script before are replaced.
def folder = "/path/to/qupath"  // the --out of segpc export

def name = getProjectEntry()?.getImageName() ?: getCurrentServer().getMetadata().getName()
name = name.replaceAll(/(?i)\.(bmp|png|jpe?g|tiff?)$/, "")
def file = new File(folder, name + ".geojson")
if (!file.exists()) {
    println "left out: ${name}, no ${file}"
    return
}
def objects = qupath.lib.io.PathIO.readObjects(file.toPath())
def ids = objects.collect { it.getID() } as Set
removeObjects(getAllObjects().findAll { it.getID() in ids }, true)
addObjects(objects)
println "${name}: ${objects.size()} cells"
